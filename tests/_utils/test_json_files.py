"""JSON of strangers: its size, depth and text are limited."""

from loraplus_jax._utils.json_files import MAX_DEPTH, MAX_JSON_BYTES, read_json

from ..refusals import refusals


def reading(content):
    def read(tmp_path):
        (tmp_path / "some.json").write_text(content)
        read_json(tmp_path / "some.json")

    return read


test_json_that_is_too_large_or_invalid_is_rejected_by_name = refusals(
    (reading('{"a": ' + "[" * 3000 + "]" * 3000 + "}"), "some.json"),  # by the parser or by our limit
    (reading('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}"), "some.json", "nested", MAX_DEPTH),
    (reading(r'{"a": ["\ud800"]}'), "some.json", "surrogate"),
    (reading(f'{{"a": -{"9" * 5000}}}'), "some.json", "5,001 digits", "4,300"),
    (reading(r'{"\udc00": 1}'), "some.json", "surrogate"),
    (reading(f'{{"a": "{"x" * MAX_JSON_BYTES}"}}'), "some.json", 1048585, 1048576),
)


def test_json_just_within_the_limits_is_read(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(r'{"\ud83d\ude00": ' + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2) + "}")
    assert list(read_json(path)) == ["😀"]
