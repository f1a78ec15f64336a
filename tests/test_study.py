"""A study's figures reach the record and the report."""

from davylamp.report.html import write_report
from davylamp.study import run_study

STUDY = '''
"""A study with a figure."""
from davylamp.core import Claim, Estimate, study

@study(version=1, source="test", licence="MIT", stage="evaluation", threats=("harmful-compliance",))
def drawn(*, size: str = "quick", seeds: tuple[int, ...] = (0,), figure: bool = True):
    """A claim, and a table where it is asked for."""
    pairs = [(Claim("rate", arm="a", at_least=0.5), Estimate(0.9, 0.8, 1.0, 10))]
    table = {"kind": "table", "title": "Lamps", "columns": ["lamp", "oil"], "rows": [["davy", 3]]}
    return (pairs, [table]) if figure else pairs
'''


def test_a_study_may_bring_figures(tmp_path):
    (tmp_path / "drawn.py").write_text(STUDY)
    folder, record = run_study(str(tmp_path / "drawn.py"), runs=tmp_path / "runs")
    assert record.claims[0]["held"] and record.about["figures"][0]["title"] == "Lamps"
    write_report(folder / "report.html", [folder], title="drawn")
    assert "Lamps" in (folder / "report.html").read_text()
    _, bare = run_study(str(tmp_path / "drawn.py"), options={"figure": "false"}, runs=tmp_path / "runs")
    assert "figures" not in bare.about
