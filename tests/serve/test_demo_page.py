"""Whatever models, questions and answers are called, the page has one script of its own."""

import re

from megatron_vlm.serve.demo_page import demo_page

HOSTILE = "\"'></script><script>alert(1)</script>"


def test_names_and_texts_are_text():
    page = demo_page(
        [HOSTILE], "", [(HOSTILE, HOSTILE, ["ab12"])], {"temperature": 0.5}, session="s", nonce="n", most_bytes=7
    )
    assert len(re.findall("<script", page)) == 1 and "MOST = 7" in page and 'value="0.5"' in page
    assert 'data-images="[&quot;ab12&quot;]"' in page and 'src="/picture/s/ab12"' in page
