"""The Flax ViT of transformers 4, with the code of the page on vision."""

import pytest

from ..pages import run

pytest.importorskip("transformers.models.vit.modeling_flax_vit")


# Flax's classes are deprecated in transformers 4.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_page_on_vision_trains_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("vision", "Linen")
    assert names["accuracy"](names["logits"]) > 0.8
    assert "vit/embeddings/patch_embeddings/projection" in names["specs"]
