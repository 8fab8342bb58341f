from tests import mutants
from tests.scripts import ROOT


def test_every_mutant_changes_code_that_is_there_and_says_why():
    found = mutants.load()  # raises where a piece of text does not occur exactly once
    assert len(found) > 1000 and all(mutant["why"] for mutant in found)
    assert "in more than 1,000 known ways" in (ROOT / "README.md").read_text()
    assert all(mutants.tests_of(mutant["file"]) for mutant in found)


def test_no_mutant_is_noticed_only_because_it_does_not_compile():
    sources = {}
    for mutant in mutants.load():
        source = sources.setdefault(mutant["file"], (ROOT / mutant["file"]).read_text())
        compile(source.replace(mutant["old"], mutant["new"]), mutant["file"], "exec")
