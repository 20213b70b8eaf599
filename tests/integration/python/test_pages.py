"""The lines of Python in README and docs/python.md, and the notebook: run as they stand, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import hosl
from saved_models import save_tiny_llama
from support import ROOT, WORDS

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "examples" / "notebook" / "messages.ipynb"


def blocks_of(page: Path) -> list[str]:
    """The page's Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_ten_lines_make_a_trained_model_of_examples(
    tmp_path: Path, traced_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks_of(ROOT / "README.md")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    first, follow, *_ = blocks_of(PAGE)
    assert first == code, "both pages have the same lines"

    # In the hub's place a folder; its tokenizer has the words of the task's prompt and of its answers.
    model = save_tiny_llama(tmp_path / "tiny", [*WORDS, "It", "terrible"])
    assert code.count(HUB_ID) == 1
    names: dict[str, Any] = {}
    exec(code.replace(HUB_ID, str(model)).replace("split=6", "split=2"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"round {n} of 20" for n in range(1, 21)]
    assert lines[-1] in ("0", "1")
    assert isinstance(names["run"], hosl.Run)

    exec(follow, names)  # what there was can be gone through again
    assert len(capsys.readouterr().out.splitlines()) == 20 + sum(each.round > 0 for each in names["run"].evaluations)


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def test_the_notebook_is_kept_with_its_outputs() -> None:
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}, "no cell failed"
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.timeout(900)  # a process of its own, which traces a model
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = read_notebook()
    # Fewer rounds, and no graphs of the gradient: what they come to is in the outputs that are kept.
    shorter = {"rounds=60": "rounds=4", '"every": 15': '"every": 2', "=tokenizer)": "=tokenizer, gradients=False)"}
    for cell in notebook.cells:
        for long, short in shorter.items():
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()

    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert re.search(r"round 2 of 4: .*\nround 4 of 4: ", said)
    (answer,) = [
        out["data"]["text/plain"]
        for cell in notebook.cells
        if "pipeline(" in cell.source
        for out in cell.outputs
        if "data" in out
    ]
    assert re.match(r"\[\{'label': '(billing|delivery|account|technical)', 'score': ", answer)
    assert list(tmp_path.iterdir()) == [], "all that it makes is temporary"
