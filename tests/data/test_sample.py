"""What is known of a video."""

from megatron_vlm.data.sample import Video


def test_times_of_a_video():
    video = Video(frames=(0, 3, 60), total=66, fps=1.5)
    assert video.times == [0.0, 2.0, 40.0] and video.seconds == 44.0
