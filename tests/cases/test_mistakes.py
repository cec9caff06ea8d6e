"""Every mistake of `mistakes` is one message with its status, loses nothing, and stands in docs/errors.md."""

import ast
import re

import pytest

from tests.cases.mistakes import ALSO, MISTAKES, PAGE, ROOT, all_answers, page

pytestmark = pytest.mark.timeout(300)  # the first one waits for all commands
NAMES = [f"{mistake.row} {mistake.done}" for mistake in MISTAKES]
OF_EACH_START = re.compile(r"runs/\w+/(loss\.png|run\.json|tensorboard/.*)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    return dict(zip(NAMES, all_answers(folder)))


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_a_mistake_is_one_message_with_its_status_and_nothing_is_lost(mistake, made):
    answer = made[f"{mistake.row} {mistake.done}"]
    said = answer.out + answer.err
    assert answer.status == mistake.status, said
    assert "Traceback" not in said
    assert said.count(mistake.says) == 1, said
    first, *more = answer.lines(mistake)
    program = re.match(r"sat-lora( \w+)?|\w+\.py", mistake.command)[0]
    if mistake.status == 2:
        assert first.startswith((f"{program}: error: ", f"{program.split()[0]}: error: ")), first
        assert not answer.left or all(name.startswith("runs/half/") for name in answer.left)  # the one that had begun
        begun = [line for line in answer.err.splitlines() if answer.left and line.startswith("skipped: ")]
        assert answer.err.splitlines() == [*begun, first, *more]  # a run that has begun has named what it left out
    else:
        assert "error" not in said and more == []
    lost = [name for name in answer.lost if mistake.status == 2 or not OF_EACH_START.fullmatch(name)]
    assert lost == []
    if mistake.saves:
        assert {"adapter/latest", "checkpoints/latest"} <= {
            name.removeprefix(f"{mistake.saves}/") for name in answer.left
        }


def test_every_row_has_its_mistakes():
    assert len({*NAMES}) == len(NAMES)
    assert sorted({mistake.row for mistake in MISTAKES}) == [*range(1, 38)]


def test_the_page_says_what_the_commands_say_now(made):
    """`python -m tests.cases.mistakes --markdown` writes it anew."""
    assert PAGE.read_text(encoding="utf-8").splitlines() == page([*made.values()]).splitlines()


@pytest.mark.parametrize("name", [name for tests in ALSO.values() for name in tests])
def test_the_tests_that_the_page_names_exist(name):
    path, function = name.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
