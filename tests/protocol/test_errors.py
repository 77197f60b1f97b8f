"""Each branch of the tree of errors is one exit code."""

from huizhen.protocol import errors


def subclasses(cls):
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_every_branch_has_its_own_exit_code_and_its_leaves_share_it():
    branches = [
        cls for cls in errors.HuizhenError.__subclasses__() if cls.__module__ == errors.__name__
    ]
    codes = [branch.exit_code for branch in branches]
    assert sorted(codes) == [2, 3, 4, 5, 6, 7, 8]  # 0 is success, 1 is a defect
    for branch in branches:
        assert {cls.exit_code for cls in subclasses(branch)} == {branch.exit_code}
    assert errors.BudgetExhaustedError.exit_code == 4
    assert errors.WireError.exit_code == 5
