"""Each way to change a ledger that docs/ledger.md names shows by what it says: the file alone, its
key, an anchor, or the heads that servers keep.

What the file alone cannot show is tested too, so that the page does not promise too little either.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedfuse.errors import LedgerError, PrivacyError
from fedfuse.privacy import disk
from fedfuse.privacy.anchor import Anchor
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.verification import Head, read_heads
from tests.privacy.ledgers import (
    Tree,
    fill,
    lines_of,
    mechanism,
    spend,
    trees_of,
    write_anew,
)


def refused(path: Path, **options: object) -> str:
    """What is wrong with a ledger, which `open` and `verify` must agree on."""
    report = verify(path, **options)  # type: ignore[arg-type]
    assert not report.holds
    with pytest.raises(LedgerError) as error:
        Ledger.open(path)
    assert str(LedgerError(error.value.what, where=error.value.where)) == report.problems[0]
    return report.problems[0]


# ---- tampering that the file alone shows


def test_no_byte_can_be_changed(any_ledger: Ledger, path: Path) -> None:
    whole = path.read_bytes()
    assert verify(path).holds
    for at in range(len(whole)):
        number = whole[:at].count(b"\n") + 1
        for mask in (1 << at % 8, whole[at]):  # the second makes it NUL
            changed = bytearray(whole)
            changed[at] ^= mask
            path.write_bytes(changed)
            (problem,) = verify(path).problems
            # Where the end of a line goes, the line after is the rest of it.
            assert f"line {number}: " in problem
    for end in (b" ", b"\r", b"\0", b"}", b"\x0b"):
        path.write_bytes(whole[:-1] + end)
        assert "line 6: it does not end as a line does" in refused(path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [*lines[:1], *lines[2:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:3], *lines[4:]], 4),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lambda lines: [*lines[:-2], lines[-1], lines[-2]], 5),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines, lines[-1]], 7),
        (lambda lines: [lines[0], *lines], 2),
        (lambda lines: [*lines, lines[0]], 7),
        (lambda lines: [*lines[:3], b"\n", *lines[3:]], 4),
        (lambda lines: [*lines, b"\n"], 7),
        (lambda lines: [*lines[:3], lines[3].replace(b":", b": "), *lines[4:]], 4),
    ],
)
def test_lines_cannot_be_deleted_moved_or_repeated(
    any_ledger: Ledger,
    path: Path,
    change: Callable[[Sequence[bytes]], Sequence[bytes]],
    line: int,
) -> None:
    path.write_bytes(b"".join(change(lines_of(path))))
    assert f"node.ledger, line {line}: " in refused(path)


def test_a_line_of_another_ledger_does_not_fit(any_ledger: Ledger, path: Path) -> None:
    other = Ledger.create(path.with_name("other"), node="clinic-a")
    fill(other, 4)
    path.write_bytes(b"".join(lines_of(path)[:3] + lines_of(other.path)[3:]))
    assert "line 4: it does not follow the line before" in refused(path)


def rewrite(**changes: object) -> Callable[[Tree], Tree]:
    return lambda tree: {**tree, **changes}


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (0, rewrite(format=2), "its format is 2"),
        (0, rewrite(kind="reserved"), "a ledger is opened in its first line"),
        (0, rewrite(ledger="a\x1b[2Jb"), "ledger must be printable"),
        (0, rewrite(public_key="\x9b", sig="0" * 128), "public_key must be printable"),
        (3, rewrite(time="\x9b"), "time must be printable"),
        (2, rewrite(kind="opened"), "a ledger is opened in its first line"),
        (2, rewrite(kind="forgiven"), "not a valid Kind"),
        (2, rewrite(extra=1), "it must have dataset, "),
        (3, rewrite(mechanism=None), "mechanism must be of type dict"),
        (3, rewrite(steps=0), "it must have "),
        (3, rewrite(round="1"), "round must be of type int"),
        (3, rewrite(round=True), "round must be of type int"),
        (3, rewrite(of=1), "a line of kind reserved cannot be of line 1"),
        (2, rewrite(of=-1), "a line of kind committed cannot be of line -1"),
        (2, rewrite(of=4), "it commits entry 4, which was not open"),
        (2, rewrite(dataset="notes"), "it commits entry 1, which was not open"),
        (2, rewrite(request="request-2"), "it commits entry 1, which was not open"),
        (4, rewrite(of=1), "it commits entry 1, which was not open"),
        (3, rewrite(request="request-1"), "it spends on a request for a second time"),
        (3, rewrite(dataset="a\x1bb"), "dataset must be printable"),
        (3, rewrite(sig="0" * 128), "it is signed, or not, other than the first line says"),
        *(
            (3, lambda tree, name=name, value=value: {
                **tree, "mechanism": {**tree["mechanism"], name: value}
            }, problem)
            for name, value, problem in (
                ("steps", 0, "steps = 0"),
                ("steps", 4.0, "steps must be of type int"),
                ("steps", True, "steps must be of type int"),
                ("sample_rate", 1, "sample_rate must be of type float"),
                ("sample_rate", -0.5, "sample_rate = -0.5"),
                ("sample_rate", 1e400, "Out of range"),
                ("noise_multiplier", 0.0, "noise_multiplier = 0.0"),
                ("unit", "none", "unit = none"),
                ("unit", "nobody", "not a valid Unit"),
                ("forgiven", 1, "it must have clip_norm"),
            )
        ),
    ],
)  # fmt: skip
def test_lines_that_hold_together_must_make_sense_too(
    ledger: Ledger, path: Path, number: int, change: Callable[[Tree], Tree], problem: str
) -> None:
    """Whatever wrote them."""
    fill(ledger)
    trees = trees_of(path)
    trees[number] = change(trees[number])
    write_anew(path, trees)
    found = refused(path)
    assert f"line {number + 1}: " in found
    assert problem in found


# ---- tampering that the file alone does not show, and what does


def changed(path: Path, key: Path | None) -> None:
    """Somebody lowers what was spent, and makes the chain fit."""
    trees = trees_of(path)
    trees[1]["mechanism"]["steps"] = 1
    write_anew(path, trees, key)


def without_the_last(path: Path, key: Path | None) -> None:
    path.write_bytes(b"".join(lines_of(path)[:-1]))


def cut_into_the_last(path: Path, key: Path | None) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def older(path: Path, key: Path | None) -> None:
    path.write_bytes(b"".join(lines_of(path)[:3]))


def another(path: Path, key: Path | None) -> None:
    """A new ledger of the same name, with nothing spent."""
    path.unlink()
    Ledger.create(path, node="clinic-a", key=key)


def went_apart(path: Path, key: Path | None) -> None:
    """An older copy, which went on by itself."""
    older(path, key)
    for number in range(3):
        spend(Ledger.open(path, key=key), f"elsewhere {number}", round=7)


Attack = Callable[[Path, Path | None], None]
NEEDS_THE_KEY = [changed, another, went_apart]
NEEDS_NO_KEY = [without_the_last, cut_into_the_last, older]
every_attack = pytest.mark.parametrize("attack", NEEDS_THE_KEY + NEEDS_NO_KEY)


@pytest.fixture(params=["without a key", "by the key's holder"])
def its_key(request: pytest.FixtureRequest) -> Path | None:
    """The key of a ledger, if it has one, which the attacker has too."""
    found = request.getfixturevalue("key") if "holder" in request.param else None
    return found if found is None else Path(found)


@every_attack
def test_file_and_key_alone_do_not_show_it(
    path: Path, its_key: Path | None, attack: Attack
) -> None:
    """docs/ledger.md says so; were it otherwise, it would have to say that."""
    ledger = Ledger.create(path, node="clinic-a", key=its_key)
    fill(ledger)
    attack(path, its_key)
    report = verify(path, public_key=ledger.public_key)
    assert report.holds
    assert report.head != ledger.head
    Ledger.open(path, key=its_key)


@every_attack
def test_an_anchor_elsewhere_shows_it(
    path: Path, tmp_path: Path, its_key: Path | None, attack: Attack
) -> None:
    anchor = tmp_path / "anchor"
    ledger = Ledger.create(path, node="clinic-a", key=its_key, anchor=anchor)
    fill(ledger)
    noted = anchor.read_bytes()
    attack(path, its_key)
    assert anchor.read_bytes() == noted
    assert not verify(path, anchor=anchor).holds
    with pytest.raises(LedgerError, match=r"lost entries|not the one that was anchored|anchors an"):
        Ledger.open(path, key=its_key, anchor=anchor)


@every_attack
def test_a_head_that_a_server_kept_shows_it(
    path: Path, tmp_path: Path, its_key: Path | None, attack: Attack
) -> None:
    ledger = Ledger.create(path, node="clinic-a", key=its_key)
    fill(ledger)
    line = {"round": 3, "node": "clinic-a", "ledger": ledger.id, "head": ledger.head}
    (tmp_path / "heads.jsonl").write_text(json.dumps(line) + "\n" + '{"round":', "utf-8")
    heads = read_heads(tmp_path / "heads.jsonl")
    assert verify(path, heads=heads).holds
    attack(path, its_key)
    report = verify(path, heads=heads)
    assert not report.holds
    assert "heads.jsonl" in report.problems[0]
    if attack is another:
        assert f"node 'clinic-a' also answered with ledger {ledger.id}" in report.notes


def test_any_line_may_be_the_head_that_a_server_kept(any_ledger: Ledger, path: Path) -> None:
    heads = [Head(hash=entry.hash, where="server") for entry in any_ledger.entries()]
    assert verify(path, heads=heads).holds
    for wrong in ("0" * 64, "", "zz", heads[2].hash[2:] + heads[3].hash[:2]):
        (problem,) = verify(path, heads=[*heads, Head(hash=wrong, where="server")]).problems
        assert "which server saw" in problem


def test_heads_of_other_ledgers_say_nothing_for_this_one(any_ledger: Ledger, path: Path) -> None:
    foreign = Head(hash=any_ledger.head, ledger="f" * 32, node="b", where="heads.jsonl, line 1")
    ours = Head(hash=any_ledger.head, ledger=any_ledger.id, node="a", where="heads.jsonl, line 2")
    assert verify(path, heads=[foreign, ours]).holds
    (problem,) = verify(path, heads=[foreign]).problems
    assert "heads.jsonl, line 1 has no line of this ledger" in problem


@pytest.mark.parametrize(
    "line", ["{}", "[]", "x", '{"round":1,"node":"a","ledger":"","head":"b"}',
             '{"round":1,"node":"a","ledger":"b","head":3}']
)  # fmt: skip
def test_a_file_of_heads_that_cannot_be_read_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "heads.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(LedgerError, match=r"heads\.jsonl, line 1: it is no head"):
        read_heads(tmp_path / "heads.jsonl")


# ---- keys


def test_without_the_key_a_change_shows_however_the_chain_was_mended(path: Path, key: Path) -> None:
    fill(Ledger.create(path, node="clinic-a", key=key))
    changed(path, None)
    assert "line 6: its signature is not that of the ledger's key" in refused(path)


def test_signing_with_another_key_shows_to_who_knows_the_right_one(
    path: Path, key: Path, tmp_path: Path
) -> None:
    ledger = Ledger.create(path, node="clinic-a", key=key)
    fill(ledger)
    right = ledger.public_key
    wrong = SigningKey.create(tmp_path / "wrong.pem")
    trees = trees_of(path)
    trees[0]["public_key"] = wrong.public
    trees[1]["mechanism"]["steps"] = 1
    write_anew(path, trees, tmp_path / "wrong.pem")
    report = verify(path)
    assert report.holds  # the file alone is in order: it names the key itself
    assert any("compare it" in note for note in report.notes)
    (problem,) = verify(path, public_key=right).problems
    assert f"its key is {wrong.public}, not {right}" in problem
    with pytest.raises(LedgerError, match="its key is"):
        Ledger.open(path, key=key)


def test_leaving_the_signatures_out_shows_to_who_knows_the_key(path: Path, key: Path) -> None:
    ledger = Ledger.create(path, node="clinic-a", key=key)
    fill(ledger)
    trees = [tree | {"sig": ""} for tree in trees_of(path)]
    write_anew(path, trees)
    assert "line 1: it is signed, or not" in refused(path)
    trees[0]["public_key"] = ""
    write_anew(path, trees)
    assert verify(path).holds
    (problem,) = verify(path, public_key=ledger.public_key).problems
    assert "its key is none" in problem
    with pytest.raises(LedgerError, match="its key is none"):
        Ledger.open(path, key=key)


def test_the_last_signature_covers_all_lines(path: Path, key: Path, tmp_path: Path) -> None:
    """Signing the last line alone, with the right key, over lines that were changed: only the
    holder of the key can. Each line's signature tells where the change was."""
    fill(Ledger.create(path, node="clinic-a", key=key))
    before = trees_of(path)
    trees = trees_of(path)
    trees[1]["mechanism"]["steps"] = 1
    write_anew(path, trees, key)
    signed = trees_of(path)
    for tree, old in zip(signed[1:-1], before[1:-1], strict=True):
        tree["sig"] = old["sig"]
    write_anew(path, signed)  # the last signature now is over another `prev`
    assert "line 6: its signature" in refused(path)
    assert "line 2: its signature" in verify(path, every_signature=True).problems[0]


def test_every_signature_is_right_in_a_good_ledger(path: Path, key: Path) -> None:
    fill(Ledger.create(path, node="clinic-a", key=key))
    seen: list[int] = []
    assert verify(path, every_signature=True, seen=seen.append).holds
    assert seen == [len(line) for line in lines_of(path)]


def test_a_signed_ledger_is_only_read_without_its_key(path: Path, key: Path) -> None:
    fill(Ledger.create(path, node="clinic-a", key=key))
    before = path.read_bytes()
    book = Ledger.open(path)
    assert book.history("scans") == (mechanism(12),)
    with pytest.raises(LedgerError, match="without its key it can only be read"):
        spend(book, "r9")
    assert path.read_bytes() == before


def test_only_the_ledgers_own_key_opens_it(path: Path, key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    SigningKey.create(other)
    Ledger.create(path, node="clinic-a", key=key)
    with pytest.raises(LedgerError, match="its key is"):
        Ledger.open(path, key=other)
    Ledger.create(path.with_name("unsigned"), node="clinic-a")
    with pytest.raises(LedgerError, match="its key is none"):
        Ledger.open(path.with_name("unsigned"), key=key)
    with pytest.raises(PrivacyError, match="cannot be read"):
        Ledger.open(path, key=tmp_path / "nosuch.pem")


@pytest.mark.parametrize("signature", ["", "0" * 128, "the last one's"])
def test_a_line_forged_without_the_key_is_refused_while_in_use(
    path: Path, key: Path, signature: str
) -> None:
    """By a process that can write the file."""
    ledger = Ledger.create(path, node="clinic-a", key=key)
    fill(ledger)
    trees = trees_of(path)
    forged = trees[-1] | {"request": "forged"}
    write_anew(path, [*trees, forged if "last" in signature else forged | {"sig": signature}])
    for _ in range(2):  # again: it is not taken for checked
        with pytest.raises(LedgerError, match="line 7: "):
            spend(ledger, "r9")
        with pytest.raises(LedgerError, match="line 7: "):
            ledger.history("scans")


# ---- anchors


def test_every_entry_is_anchored_before_it_is_acknowledged(
    path: Path, key: Path, anchor: Path
) -> None:
    ledger = Ledger.create(path, node="clinic-a", key=key, anchor=anchor)
    assert Anchor.read(anchor).hash == ledger.head
    entry = spend(ledger, "r1")
    assert (Anchor.read(anchor).number, Anchor.read(anchor).hash) == (1, entry.hash)
    committed = ledger.commit(entry)
    assert (Anchor.read(anchor).number, Anchor.read(anchor).hash) == (2, committed.hash)
    assert list(anchor.parent.iterdir()) == [anchor]


def test_an_anchor_on_its_disk_before_an_entry_is_acknowledged(
    path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.create(path, node="clinic-a", anchor=anchor)
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), real(handle))
    )
    spend(ledger, "r1")
    folder = anchor.parent.stat().st_ino
    assert synced[0] == path.stat().st_ino
    assert anchor.stat().st_ino in synced[1:]
    assert synced[-1] == folder


def test_a_ledger_ahead_of_its_anchor_is_good(path: Path, anchor: Path) -> None:
    """As after a crash between the two; the entry counts."""
    ledger = Ledger.create(path, node="clinic-a", anchor=anchor)
    spend(ledger, "r1")
    old = anchor.read_bytes()
    spend(ledger, "r2")
    anchor.write_bytes(old)
    again = Ledger.open(path, anchor=anchor)
    assert again.history("scans") == (mechanism(8),)
    spend(again, "r3")
    assert Anchor.read(anchor).number == 3


def test_without_its_anchor_nothing_is_believed(path: Path, anchor: Path) -> None:
    ledger = Ledger.create(path, node="clinic-a", anchor=anchor)
    anchor.unlink()
    before = path.read_bytes()
    for ask in (
        lambda: spend(ledger, "r1"),
        lambda: Ledger.open(path, anchor=anchor),
        lambda: ledger.history("scans"),
    ):
        with pytest.raises(LedgerError, match="the anchor cannot be read"):
            ask()
    assert not verify(path, anchor=anchor).holds
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"ledger":"x"}', '{"ledger":"x","number":"1","hash":"","signature":""}'],
)
def test_what_is_no_anchor_is_refused(path: Path, anchor: Path, text: str) -> None:
    Ledger.create(path, node="clinic-a", anchor=anchor)
    anchor.write_text(text, encoding="utf-8")
    with pytest.raises(LedgerError, match="it is no anchor"):
        Ledger.open(path, anchor=anchor)


def test_an_anchor_that_was_made_without_the_key_is_refused(
    path: Path, key: Path, anchor: Path
) -> None:
    """An older copy of the ledger cannot be given an anchor of its own."""
    fill(Ledger.create(path, node="clinic-a", key=key, anchor=anchor))
    older(path, None)
    tree = json.loads(anchor.read_bytes())
    last = trees_of(path)[-1]
    anchor.write_text(json.dumps(tree | {"number": last["number"], "hash": last["hash"]}), "utf-8")
    with pytest.raises(LedgerError, match="it is not signed with the ledger's key"):
        Ledger.open(path, key=key, anchor=anchor)


def test_older_copies_of_both_alone_do_not_show(path: Path, key: Path, anchor: Path) -> None:
    """docs/ledger.md says so: the anchor must lie where the ledger's attacker cannot write."""
    ledger = Ledger.create(path, node="clinic-a", key=key, anchor=anchor)
    old = path.read_bytes(), anchor.read_bytes()
    fill(ledger)
    head = Head(hash=ledger.head, where="server")
    path.write_bytes(old[0])
    anchor.write_bytes(old[1])
    assert verify(path, anchor=anchor, public_key=ledger.public_key).holds
    assert not verify(path, heads=[head]).holds


def test_two_copies_that_go_apart_meet_at_their_anchor(
    path: Path, anchor: Path, tmp_path: Path
) -> None:
    """Each would have a budget of its own."""
    one = Ledger.create(path, node="clinic-a", anchor=anchor)
    shutil.copy(path, tmp_path / "copy")
    two = Ledger.open(tmp_path / "copy", anchor=anchor)
    spend(one, "r1")
    before = two.path.read_bytes()
    with pytest.raises(LedgerError, match="ends with entry 0, but 1 was anchored"):
        spend(two, "r2")
    assert two.path.read_bytes() == before


def test_an_anchor_of_another_ledger_is_refused(path: Path, anchor: Path) -> None:
    Ledger.create(path, node="clinic-a", anchor=anchor)
    Ledger.create(path.with_name("other"), node="clinic-a")
    with pytest.raises(LedgerError, match="it anchors another ledger"):
        Ledger.open(path.with_name("other"), anchor=anchor)
    with pytest.raises(LedgerError, match="the anchor of another ledger is there already"):
        Ledger.create(path.with_name("third"), node="clinic-a", anchor=anchor)
    assert not path.with_name("third").exists()


def test_where_the_anchor_cannot_be_written_the_entry_counts_and_no_work_starts(
    path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger.create(path, node="clinic-a", anchor=anchor)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "replace", full)
        with pytest.raises(LedgerError, match="counts as spent, but the anchor cannot be written"):
            spend(ledger, "r1")
    assert ledger.history("scans") == (mechanism(4),)
    spend(ledger, "r2")
    assert Ledger.open(path, anchor=anchor).history("scans") == (mechanism(8),)


def test_a_ledger_without_the_anchor_asked_for_is_not_made(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="anchor"):
        Ledger.create(path, node="clinic-a", anchor=tmp_path / "nosuch" / "anchor")
    assert not path.exists()


def test_an_anchor_can_begin_later_and_is_never_replaced(
    any_ledger: Ledger, path: Path, anchor: Path
) -> None:
    any_ledger.anchor(anchor)
    spend(any_ledger, "r9")
    assert Anchor.read(anchor).hash == any_ledger.head
    assert verify(path, anchor=anchor).holds
    with pytest.raises(LedgerError, match="an anchor is there already"):
        any_ledger.anchor(anchor)
