import json, time
import pytest
@pytest.mark.parametrize("args", [("5e-3","60"), ("1e-2","60"), ("2e-2","60"), ("1e-2","100"),("4e-2","60")])
def test_x(world, args, capsys):
        t = time.time()
        d = world.trained("--optimizer.learning_rate", args[0], "--train.steps", args[1], "--train.eval_every", "20")
        with capsys.disabled():
            print(args, time.time() - t, json.loads((d / "summary.json").read_text())["after"])
@pytest.mark.parametrize("args", ["lora", "full"])
def test_y(world, args, capsys):
        t = time.time()
        d = world.trained("--optimizer.learning_rate", "1e-2", "--train.steps", "60", "--train.eval_every", "20", "--method", args)
        with capsys.disabled():
            print(args, time.time() - t, json.loads((d / "summary.json").read_text())["after"])
