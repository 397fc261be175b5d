"""The notebook's cells run, and print the outputs that are saved in it.

After a change, ``python -m tests.test_notebook`` executes it again and saves what it prints and draws.
"""

import base64
import contextlib
import io
import json

import matplotlib
import pytest

from tests.conftest import PROJECT

NOTEBOOK = PROJECT / "docs/own_figure.ipynb"


def executed(notebook):
    """The notebook with the outputs of its cells: what they print, and the figures that they show."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names = {}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyplot, "show", lambda: None)
            exec("".join(cell["source"]), names)
        outputs = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            figure.savefig(picture, dpi=100)
            data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": str(figure)}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        pyplot.close("all")
        cell |= {"execution_count": number, "outputs": outputs}
    return notebook


def outputs(notebook):
    """The printed texts, and the sizes of figures, whose pixels depend on the machine's fonts."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [each.get("text", each.get("data", {}).get("text/plain")) for cell in cells for each in cell["outputs"]]


def test_the_notebook_gives_what_is_kept_with_it(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter starts it
    kept = json.loads(NOTEBOOK.read_text())
    found = outputs(executed(json.loads(NOTEBOOK.read_text())))
    assert len(found) == 3
    assert found == outputs(kept)
    assert NOTEBOOK.stat().st_size < 100_000


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(executed(json.loads(NOTEBOOK.read_text())), indent=1, ensure_ascii=False) + "\n")
