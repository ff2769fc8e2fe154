"""Processes are told apart from others that bear their number later."""

import os

from megatron_vlm.processes import Identity, state


def test_an_identity_is_of_one_process(tmp_path):
    me = Identity.of()
    assert me.lives and not me.stopped and me.here
    later = Identity(me.host, me.place, me.pid, me.start + 1)  # the number, used again
    assert not later.lives
    later.kill()
    assert Identity("elsewhere", me.place, 1, 1).lives
    assert state(os.getpid()) in "RS" and not state(2**22 + 1)
    assert Identity.from_dict(me.to_dict()) == me
