"""Recipes: configs that ship with the package and are named without a path."""

from pathlib import Path

from .._utils.validation import expand_path, suggest

_PACKAGE = Path(__file__).parents[1]
# A wheel has them inside the package; in a clone, and so in an editable install, they are next to it.
_DIRECTORY = next(path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "configs") if path.is_dir())
RECIPES = {path.stem: path for path in sorted(_DIRECTORY.glob("*.yaml"))}
"""The recipes' files by name."""


def read_recipe(name: str) -> str:
    """Returns the text of a recipe."""
    return find_recipe(name).read_text(encoding="utf-8")


def list_recipes() -> str:
    """Returns every recipe's name and the first line of its comment, which says what it does."""
    width = max(map(len, RECIPES))
    return "\n".join(f"{name:{width}} {read_recipe(name).splitlines()[0][2:]}" for name in RECIPES)


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in RECIPES:
        raise ValueError(
            f"no recipe is named {name!r}, and a file of your own needs its path, with / or the ending .yaml"
            f"{suggest(name, RECIPES)}"
        )
    return RECIPES[name]


def find_config(config: str | Path) -> Path:
    """Returns the file of a config, which is a path, or the name of a recipe.

    Raises:
      ValueError: it is neither.
    """
    path = expand_path("config", config)
    if path.name == str(config) and path.suffix != ".yaml" and not path.is_file():
        return find_recipe(path.name)
    if not path.exists():
        recipe = f"; the recipe of this name is {path.stem}" if path.stem in RECIPES else ""
        raise ValueError(f"config file not found: {path}{recipe}")
    return path
