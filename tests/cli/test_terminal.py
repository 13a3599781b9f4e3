"""What commands print."""

from cli.terminal import show_table


def test_a_table_in_a_file_breaks_no_name(capsys):
    names = ["a drafter of a long name", "eagle2:4,4,12"]
    show_table("title", ("drafter", "policy", *("numbers" * 2 for _ in range(5))), [[*names, *"12345"]], names=2)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
