"""What is unpacked from an archive."""

import pytest

from loraplus_jax.data.archives import extract

from ..messages import mentions
from .archive_bytes import tar_bytes, zip_bytes


@pytest.mark.parametrize("name", ["m/../../evil", "m//etc/evil", "m/..\\evil", "m/C:evil"])
@pytest.mark.parametrize(("make", "suffix"), [(zip_bytes, ".whl"), (tar_bytes, ".tar.gz")])
def test_members_may_not_leave_the_directory(tmp_path, name, make, suffix):
    archive = tmp_path / f"a{suffix}"
    archive.write_bytes(make({"m/good": "x", name: "evil"}))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=mentions(archive.name, repr(name.removeprefix("m/")))):
        extract(archive, {"m/": ""}, tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_is_not_unpacked_and_a_missing_member_is_named(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_bytes({"m/good": "x"}, link="m/link"))
    with pytest.raises(ValueError, match=mentions("'m/link'", "'other/'")):
        extract(archive, {"m/link": "link", "other/": "", "m/good": "g"}, tmp_path)
    assert not (tmp_path / "link").is_symlink()
