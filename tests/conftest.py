"""What every test may ask of the command line."""


def pytest_addoption(parser):
    group = parser.getgroup("test_replaceable_state.py")
    group.addoption("--state-sequences", type=int, metavar="N", help="N sequences, not always 200")
    group.addoption("--state-seed", type=int, metavar="S", help="the first sequence's number")
