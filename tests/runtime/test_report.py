"""The HTML page that quickstarts and sweeps write."""
import sys

from experiments.runtime.report import Report


def test_a_chart_that_cannot_be_drawn_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    def saved(name):
        page = Report('A run')
        page.lines({'encoder': ([0, 1], [2.0, 1.0])}, 'encoder loss')
        page.table([{'stage': 'encoder', 'seconds': 3.0}])
        page.save(tmp_path / name)
        return (tmp_path / name).read_text()
    assert '<img class=chart alt="encoder loss"' in saved('with.html')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    without = saved('without.html')
    assert '<img' not in without and 'encoder loss: not drawn; pip install matplotlib' in without
    assert '<td>encoder</td>' in without
