"""Data-to-text: linearized inputs, grouped references, the chosen inputs, and every fault with its line."""

import pytest

from loraplus_jax.data.conversations import Turn
from loraplus_jax.data.data_to_text import (
    group_references,
    linearize,
    read_descriptions,
    read_inputs,
    select_inputs,
)

from ..messages import mentions
from ..refusals import refusals

MR = "name[The Rice Boat], food[French, Italian], customer rating[5 out of 5]"
LINE = "name : The Rice Boat | food : French, Italian | customer rating : 5 out of 5"
TABLE = f'''mr,ref
"{MR}",The Rice Boat is good.
"name[Zizzi]","Zizzi, a place."
"{MR.replace("], ", "] ,")}","It is ""good""."
near : Zizzi,Near Zizzi.
'''


def write(tmp_path, text, name="e2e.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_become_conversations_and_texts_of_one_input_its_references(tmp_path):
    rows = read_descriptions(write(tmp_path, TABLE))
    assert [row.turns for row in rows[:2]] == [
        (Turn("user", LINE), Turn("assistant", "The Rice Boat is good.")),
        (Turn("user", "name : Zizzi"), Turn("assistant", "Zizzi, a place.")),
    ]
    assert rows[0].mr == MR
    assert rows[1].place.endswith("e2e.csv:3")
    assert [(x.mr, x.turn.text, x.references) for x in group_references(rows)] == [
        (MR, LINE, ("The Rice Boat is good.", 'It is "good".')),
        ("name[Zizzi]", "name : Zizzi", ("Zizzi, a place.",)),
        ("near : Zizzi", "near : Zizzi", ("Near Zizzi.",)),
    ]


def test_commas_within_values_and_spaces_around_slots():
    assert linearize(MR) == LINE
    assert linearize(" a[ 1 ] ,b c[]") == "a : 1 | b c : "
    assert linearize("a : 1 | b : 2") == "a : 1 | b : 2"


def describing(text):
    return lambda tmp_path: read_descriptions(write(tmp_path, text))


NO_SLOTS = ("name[Zizzi", "name]Zizzi[", "[Zizzi]", "name[a] food[b]", "name[a], food", "a[b[c]]")

test_files_that_are_rejected_with_the_line = refusals(
    *((describing(f'mr,ref\nname[a],b\n"{mr}",c\n'), "e2e.csv:3", "mr", "slot[value]") for mr in NO_SLOTS),
    (describing("mr,text\na[b],c\n"), "e2e.csv:1", "ref"),
    (describing("meaning,ref\na[b],c\n"), "e2e.csv:1", "mr"),
    (describing("mr,ref\na[b],c\n,d\n"), "e2e.csv:3", "mr", "empty"),
    (describing("mr,ref\na[b],c\na[b],\n"), "e2e.csv:3", "ref", "empty"),
    (describing(""), "empty"),
    (describing("mr,ref\n"), "no rows"),
)


def test_columns_of_other_names_and_inputs_without_texts(tmp_path):
    path = write(tmp_path, '{"in": "a[b]"}\n{"in": "c[d]"}\n{"in": "a[b]"}\n', "inputs.jsonl")
    assert [x.turn.text for x in read_inputs(path, {"mr": "in"})] == ["a : b", "c : d"]
    with pytest.raises(ValueError, match=mentions("column_names", "mr", "ref", "label")):
        read_inputs(path, {"label": "in"})


def test_selected_inputs_are_evenly_spaced_and_keep_all_their_texts(tmp_path):
    table = "mr,ref\n" + "".join(f"a[{n}],{k}\n" for n in range(7) for k in range(n + 1))
    rows = read_descriptions(write(tmp_path, table))
    kept = select_inputs(rows, 3)
    found = [(x.mr, len(x.references)) for x in group_references(kept)]
    assert found == [("a[0]", 1), ("a[3]", 4), ("a[6]", 7)]
    with pytest.raises(ValueError, match=mentions("generation.inputs", 7, 8)):
        select_inputs(rows, 8)
