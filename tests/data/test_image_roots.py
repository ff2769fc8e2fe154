"""Pictures that are not found: the folder they start from is named, where it is near."""

import json

from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.data.image_roots import names_of, wrong_root


def source(tmp_path, names, root):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A digit."}]
    path = tmp_path / "data" / "a.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"image": name, "conversations": talk} for name in names]))
    return RecordSource(format="llava", path=str(path), root=str(root))


def picture(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_most_pictures_are_elsewhere(tmp_path):
    found = source(tmp_path, ["x/0.png", "x/1.png", "x/2.png"], tmp_path / "images")
    assert list(names_of(found)) == ["x/0.png", "x/1.png", "x/2.png"]
    text = wrong_root([found])
    assert "3 of the first 3 pictures" in text and f"the first is {tmp_path / 'images' / 'x/0.png'}" in text
    assert "is that the folder that the paths start from? --image-root DIR" in text
    picture(tmp_path / "data" / "pictures", "x/0.png")  # a folder beside the file
    assert wrong_root([found]).endswith(f"--image-root {tmp_path / 'data' / 'pictures'}")


def test_a_few_lost_pictures_say_nothing_of_the_folder(tmp_path):
    picture(tmp_path / "images", "0.png")
    picture(tmp_path / "images", "1.png")
    assert wrong_root([source(tmp_path, ["0.png", "1.png", "2.png"], tmp_path / "images")]) == ""
    assert wrong_root([]) == ""
