"""What continuous integration runs of the slow tests."""

from hashlib import sha1

from slices import SLICES, chosen, slice_of

TESTS = [f"tests/test_{n % 7}.py::test[{n}]" for n in range(300)]
COMMITS = [sha1(str(n).encode()).hexdigest() for n in range(200)]


def test_slice_depends_on_the_commit_alone():
    assert chosen(TESTS, COMMITS[0]) == chosen(TESTS[::-1], COMMITS[0])
    more = chosen([*TESTS, "tests/test_new.py::test"], COMMITS[0])
    assert [test for test in more if test in TESTS] == chosen(TESTS, COMMITS[0])


def test_slices_are_all_the_tests_once_and_commits_choose_all_slices():
    commits = {slice_of(commit): commit for commit in COMMITS}
    assert len(commits) == SLICES
    assert sorted(t for commit in commits.values() for t in chosen(TESTS, commit)) == sorted(TESTS)


def test_commits_of_one_slice_begin_with_other_tests():
    same = [commit for commit in COMMITS if slice_of(commit) == 3]
    assert len({chosen(TESTS, commit)[0] for commit in same}) > 3
