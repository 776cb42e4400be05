"""README and docs say what is so: their code runs, their links and tests exist, their pictures are the code's own."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from forks import run_script

from ringflash.launch import plan

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
PAGE_NAMES = [str(page.relative_to(CHECKOUT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    """(target, title) of each link to a file of this repository."""
    found = re.findall(r"\]\(([^)\s]+)(?: \"([^\"]*)\")?\)", page.read_text())
    return [(target, title) for target, title in found if "://" not in target and not target.startswith("#")]


def commands(page: Path) -> list[list[str]]:
    """Shell commands of a page, as words without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_to_files(page: Path) -> None:
    missing = [target for target, _ in links(page) if not (page.parent / target.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_to_tests_name_tests_of_that_file(page: Path) -> None:
    for target, title in links(page):
        if Path(target).name.startswith("test_"):
            tree = ast.parse((page.parent / target).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert title.startswith("test_"), f"the link to {target} names no test"
            assert title in names, f"{target} has no {title}"


def test_each_row_of_what_is_supported_links_a_test() -> None:
    page = (CHECKOUT / "docs/supported.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 50
    assert [row for row in rows if "](../tests/" not in row] == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_make_targets_and_scripts_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        for word in words:
            if word.startswith(("launch/", "tests/")):
                assert (CHECKOUT / word.split("::")[0]).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_overrides_are_keys_of_the_configuration(page: Path) -> None:
    from hydra import compose, initialize_config_module

    from ringflash.configs.schema import register

    register()
    for words in commands(page):
        arguments = [word for word in words if word.startswith("ARGS=")]
        if "launch/train.py" in words:
            overrides = [word for word in words[words.index("launch/train.py") + 1 :] if "=" in word]
        elif words[:2] == ["make", "train"] and arguments:
            overrides = shlex.split(arguments[0].removeprefix("ARGS="))
        else:
            continue
        with initialize_config_module("ringflash.configs", version_base="1.3"):
            compose("config", overrides=overrides)


def printed(program: str, name: str, ranks: int | None, folder: Path) -> str:
    """What a program prints, by one rank behind the other; started alone if ranks is None."""
    (folder / name).write_text(program)
    result = run_script(folder / name, folder=folder, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/sagemaker.md", "docs/masks.md"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_python_in_pages_runs_alone_and_on_two_ranks(page: str, ranks: int, tmp_path: Path) -> None:
    examples = blocks(CHECKOUT / page, "python")
    assert examples
    for number, example in enumerate(examples):
        printed(example, f"example_{number}.py", ranks if ranks > 1 else None, tmp_path)


def run_as_one_script(page: str, ranks: int | None, folder: Path) -> str:
    """What a page's Python prints, started alone if ranks is None."""
    return printed("\n".join(blocks(CHECKOUT / page, "python")), "example.py", ranks, folder)


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[\d.]+", text)]


def test_transformers_page_prints_the_same_alone_and_on_two_ranks(tmp_path: Path) -> None:
    alone, both = (
        re.findall(r"([A-Za-z ]+): ([\d.]+|\[.*?\])", run_as_one_script("docs/transformers.md", ranks, tmp_path))
        for ranks in (None, 2)
    )
    assert len(alone) > 4
    assert sorted(words for words, _ in both) == sorted(words for words, _ in alone * 2)
    for words, found in both:
        assert numbers(found) == pytest.approx(numbers(dict(alone)[words]), abs=2e-4), words


def test_the_hybrid_of_the_hybrid_page_learns_the_same_on_one_rank_and_on_more(tmp_path: Path) -> None:
    alone, *others = (run_as_one_script("docs/hybrid.md", ranks, tmp_path).splitlines() for ranks in (None, 2, 4))
    losses = [numbers(line)[1] for line in alone]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    for lines in others:
        assert [numbers(line)[1] for line in lines] == pytest.approx(losses, abs=2e-4)


def test_every_engine_of_the_engines_page_prints_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    engines = re.findall(r'report\("(.*)", ', (CHECKOUT / "docs/engines.md").read_text())
    assert len(engines) == 4
    expected = None
    for ranks in (1, 2):
        lines = run_as_one_script("docs/engines.md", ranks, tmp_path).splitlines()
        for name, line in zip(engines, lines, strict=True):
            found = numbers(line.removeprefix(name + " "))
            expected = expected or found
            assert found == pytest.approx(expected, abs=2e-4), line


def test_each_problem_links_its_thread_and_a_test_or_says_that_it_is_not_solved() -> None:
    rows = [line for line in (CHECKOUT / "docs/problems.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 16))
    for row in rows:
        _, _, problem, here, _ = row.split("|")
        assert "](https://github.com/" in problem
        assert "](../tests/" in here or "**Not s" in here


def test_the_picture_of_the_plan_is_what_the_code_draws(tmp_path: Path) -> None:
    plan.main(["--svg", str(tmp_path / "plan.svg")])
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn == (CHECKOUT / "docs/plan.svg").read_text(), "python launch/plan.py --svg docs/plan.svg"
