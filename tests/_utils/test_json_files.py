"""JSON of strangers: its size, depth and text are limited."""

import pytest

from loraplus_jax._utils.json_files import MAX_DEPTH, MAX_JSON_BYTES, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
            "recursion|100|JSON object",
        ),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", f"nested.* {MAX_DEPTH}"),
        (r'{"a": ["\ud800"]}', "surrogate"),
        (f'{{"a": -{"9" * 5000}}}', "5,001 digits.* 4,300"),
        (r'{"\udc00": 1}', "surrogate"),
        (f'{{"a": "{"x" * MAX_JSON_BYTES}"}}', "1048585.*1048576"),
    ],
)
def test_json_that_is_too_large_or_invalid_is_rejected_by_name(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"some.json.*({message})"):
        read_json(path)


def test_json_just_within_the_limits_is_read(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(r'{"\ud83d\ude00": ' + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2) + "}")
    assert list(read_json(path)) == ["😀"]
