"""What is asked of whoever claims differential privacy, answered for one section of the report.

    reporting   the items of Ponomareva et al. 2023, How to DP-fy ML (arXiv:2303.00654v3),
                section 5.3, one by one
    hazards     the topics of NIST SP 800-226, Guidelines for Evaluating Differential Privacy
                Guarantees (2025), from its pyramid's top to its base
    uncovered   what no figure of the report is about

Topics are the publications'; the answers, and the words, are ours. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedfuse.privacy.accounting import LEAST_SIGMA, STATEMENT_GRID, shown
from fedfuse.privacy.spec import Unit
from fedfuse.reports.facts import Facts
from fedfuse.reports.wording import verdicts, weight

__all__ = ["Answer", "hazards", "reporting", "uncovered"]

Answer = tuple[str, str]
"""(what is asked, the answer)."""


def reporting(facts: Facts) -> tuple[Answer, ...]:
    """The reporting items, answered."""
    if not facts.private:
        return (("DP setting", "None: nothing is promised, so no other item has an answer."),)
    return (
        ("DP setting", _setting(facts)),
        ("Instantiating the DP definition: data accesses covered", _accesses(facts)),
        ("Instantiating the DP definition: final mechanism output", _output(facts)),
        ("Instantiating the DP definition: unit of privacy", _unit(facts)),
        ("Instantiating the DP definition: neighbouring data sets", _relation(facts)),
        ("Privacy accounting: type of accounting", _accounting(facts)),
        ("Privacy accounting: assumptions, and whether they hold", _assumed(facts)),
        ("Privacy accounting: formal statement", _formal(facts)),
        (
            "Transparency and verifiability",
            "fedfuse is open source. The certificate lists every release; "
            "`fedfuse report verify` derives each epsilon from them with a second accountant that "
            "shares no code with the first, and anybody with an accountant of their own can too.",
        ),
    )


def hazards(facts: Facts) -> tuple[Answer, ...]:
    """The topics of the guidelines, from the top of the pyramid to its base."""
    return (
        ("Epsilon", _epsilon(facts)),
        ("Unit of privacy", _unit(facts)),
        ("Definition of neighbours", _relation(facts)),
        ("Comparing guarantees", _comparing(facts)),
        ("Composition across releases", _composition(facts)),
        ("Other releases of the same data", _mixing(facts)),
        ("Utility", _utility(facts)),
        (
            "Bias",
            "Not measured here. Clipping and noise cost most where records are rare: classes and "
            "groups with few records lose more accuracy than the average shows. Look at the "
            "metrics by class and by group before a model is used.",
        ),
        (
            "Query model",
            "One model is trained, in rounds that the configuration fixes before the first one. "
            "Nobody can ask further questions of the records; questions to the finished model cost "
            "nothing more."
            if facts.kind != "ledger"
            else "Servers ask for rounds of training; the node weighs each request against its "
            "whole ledger before it reads a record.",
        ),
        ("Trust model", _trust(facts)),
        ("Correct algorithms", _correctness(facts)),
        (
            "Randomness",
            _randomness(facts),
        ),
        (
            "Floating point",
            "Noise is made in float64 from sums of four normals (Holohan and Braghin 2021, "
            "arXiv:2107.10138v4), which hides what the low bits of one would tell (Mironov 2012). "
            "It is a mitigation, not a discrete mechanism with a proof."
            if facts.private
            else "Of no matter: there is no noise.",
        ),
        (
            "Side channels",
            "Not covered. How long a node takes, which batches were empty, memory use and network "
            "traffic may tell something about records; whoever shares the machine sees more.",
        ),
        (
            "Data security and access control",
            "Not covered by any figure. Differential privacy limits what releases tell; it does "
            "nothing for records on a disk that somebody can read.",
        ),
        (
            "Data collection exposure",
            "Not covered. Records are exposed to whoever collects, labels and stores them at the "
            "node, before any of this begins. Collect no more than is needed."
            + (" In this simulation all records are on one machine." if facts.simulated else ""),
        ),
    )


def uncovered(facts: Facts) -> tuple[str, ...]:
    """What no figure here is about."""
    return tuple(_uncovered(facts))


def _uncovered(facts: Facts) -> Iterator[str]:
    if not facts.private:
        yield "Everything: training records have no protection at all in this run."
        return
    if facts.config is not None:
        if facts.simulated:
            yield (
                "This was a simulation: all data was on one machine, and nobody was protected by "
                "it. It shows what a federation of separate nodes would promise."
            )
        yield "The valid and test records: they are the server's, which evaluates on them."
        yield (
            "Settings that were chosen by looking at training records, in this run or in trials "
            "before it."
        )
    yield "Releases of the same records that are in none of these books."
    yield (
        "What holds of people whether or not they are in the data: a model that learns that "
        "smokers fall ill tells something about every smoker."
    )
    yield "Records that hang together (of a family, say), beyond the unit that is stated."
    yield "Side channels, the security of the machines, and people who may read records anyway."
    yield "A node or a server that runs something else than it says."


def _setting(facts: Facts) -> str:
    if facts.config is None:
        return (
            "A node's releases, which carry their noise when they leave it, to whichever server: "
            "what a ledger records does not say more."
        )
    privacy = facts.config.privacy
    if privacy.unit != Unit.NODE:
        return (
            "Federated, with noise at each node. Each node is a trusted curator of its own "
            "records: it samples, clips and adds all the noise itself before anything leaves it. "
            "Neither the server nor another node is trusted. This is neither local privacy of "
            "single persons nor a central curator."
        )
    if privacy.noise_by == "nodes":
        masked = facts.config.federation.secure_aggregation
        sums = (
            "and masks leave the server nothing but sums."
            if masked
            else "and on a server that looks at nothing but sums. What single updates tell is the "
            "other figure."
        )
        return (
            "Distributed: each node clips its update and adds "
            + (
                "all the noise"
                if privacy.noise_nodes == 1
                else f"a share of the noise, of which {privacy.noise_nodes} make the whole"
            )
            + " before it leaves. Sums over nodes carry the noise of all of them: the model's "
            f"figure rests on that, {sums}"
        )
    return (
        "Central: the server sees updates without noise, clips them, adds the noise and is trusted "
        "to do so."
    )


def _accesses(facts: Facts) -> str:
    if facts.config is None:
        return (
            "Every release in the ledger: all runs, of all servers, finished or broken off. What "
            "was done with the records without the ledger is not covered."
        )
    return (
        "Every training step of this run, of each node, finished or broken off. Not covered: "
        "choosing the configuration by looking at training records, earlier runs on the same "
        "records, and the valid and test records."
    )


def _output(facts: Facts) -> str:
    if facts.kind == "ledger" or facts.config is None:
        return "All updates that were sent, and so everything computed from them."
    if facts.config.privacy.unit == Unit.NODE:
        return (
            "For whoever gets the model: the sums of all rounds, and so every model in between. "
            "For whoever sees updates, see the statements."
        )
    return (
        "All updates of all rounds, as the server sees them; the models in between and the final "
        "one are computed from these. No figure rests on the updates being kept secret."
    )


def _unit(facts: Facts) -> str:
    if not facts.private:
        return "None: nothing is promised."
    units = sorted({one.unit for one in facts.statements}) or [Unit.NONE]
    texts = {
        Unit.RECORD: "One record. Where a person has several, the figure holds for one of them, "
        "not for the person: k records of a person cost about k times as much, and more in delta.",
        Unit.SUBJECT: "All records of one subject at one node, named by the manifest's subject "
        "column. A person under two names, or at two nodes, is two subjects.",
        Unit.NODE: "All training data of a whole node. Persons who are at several nodes are not "
        "covered by it.",
        Unit.NONE: "Nothing was released yet.",
    }
    return " ".join(texts[unit] for unit in units)


def _relation(facts: Facts) -> str:
    if not facts.private:
        return "None: nothing is promised."
    replaced = (
        f" Replacing one unit by another costs epsilon = {shown(facts.detail.replace)} at delta = "
        f"{facts.delta:g} ({facts.accounts[0].label})."
        if facts.detail
        else ""
    )
    return (
        "Add or remove: two data sets are neighbours where one has one unit more. Who was asked "
        "for a replace-one guarantee must take the larger figure." + replaced
    )


def _accounting(facts: Facts) -> str:
    return (
        "Privacy loss distributions of Poisson-sampled Gaussian mechanisms (dp-accounting), "
        f"pessimistic, on a grid of {STATEMENT_GRID:g}: an upper bound. Renyi differential privacy "
        "is the check from above; losses rounded down, and a second accountant that shares no code "
        "with the first, are the checks from below."
    )


def _assumed(facts: Facts) -> str:
    broken = "; ".join(one.text for one in facts.broken)
    return (
        verdicts(facts)
        + (f": {broken}" if broken else "")
        + ". Each stands in the list of assumptions with its evidence."
    )


def _formal(facts: Facts) -> str:
    if not facts.accounts:
        return facts.sentence
    mu = shown(facts.accounts[0].figures.mu)
    return (
        f"{facts.sentence} Summed up as Gaussian DP: mu = {mu}. More points of the "
        "(epsilon, delta) curve are in the certificate."
    )


def _epsilon(facts: Facts) -> str:
    if not facts.private:
        return "There is none: nothing bounds what the releases tell."
    if facts.detail is None:
        return "Nothing was released yet."
    epsilon = facts.accounts[0].figures.epsilon
    return (
        f"{shown(epsilon)} at delta = {facts.delta:g} for {facts.accounts[0].label}, who spent "
        f"most. {weight(epsilon)} What it means for an attacker is worked out above. delta should "
        "be well below one over the number of units; fedfuse does not know that number."
    )


def _comparing(facts: Facts) -> str:
    if not facts.private:
        return "A run without a promise compares with no other."
    return (
        "An epsilon compares with another only at the same delta, unit, neighbouring relation and "
        "adversary. mu, the whole curve and the replace-one figure are given so that other "
        "reports can be compared with this one."
    )


def _composition(facts: Facts) -> str:
    if not facts.private:
        return "Without a bound for one release there is none for several."
    if facts.kind == "ledger":
        return (
            "All releases in the ledger are composed, of each data set by itself. Two data sets "
            "that share records are added up by nobody."
        )
    if facts.kind == "together":
        return "All releases of the sources named are composed, as if each had the same records."
    return (
        "All steps of all rounds of this run are composed as mechanisms, never as a sum of "
        "epsilons. Other runs on the same records are not in this figure: give the report all of "
        "them at once, or a node's ledger, to see them together."
    )


def _mixing(facts: Facts) -> str:
    return (
        "Anything else that is published about the same records, private or not, adds to what can "
        "be learned. No report can see it."
        + (
            " In this run no loss, metric or count of a node's training data leaves the node."
            if facts.private and facts.config is not None
            else ""
        )
    )


def _utility(facts: Facts) -> str:
    outcome = facts.outcome
    if outcome is None or outcome.value is None:
        return "Not known here: a ledger, or an unfinished run, says nothing about a model's use."
    words = outcome.headline.replace("_", " ")
    baseline = (
        f"; the best constant answer gives {outcome.baseline:.4g}"
        if outcome.baseline is not None
        else ""
    )
    return (
        f"{words} {outcome.value:.4g} on the server's test records{baseline}. The same "
        "configuration with privacy.unit = none shows what the promise costs."
        if facts.private
        else f"{words} {outcome.value:.4g} on the server's test records{baseline}."
    )


def _trust(facts: Facts) -> str:
    if not facts.private:
        return "The server and everybody after it must be trusted with the records themselves."
    each = "; ".join(
        f"against {one.against}: "
        + ("nothing" if one.epsilon is None else f"epsilon = {shown(one.epsilon)}")
        for one in facts.statements
    )
    return (
        f"What holds {each or 'is said once something was released'}. Each node is trusted with "
        "its own records and to run what it says. Nodes need not trust each other with records, "
        "but any of them can spoil the model."
    )


def _correctness(facts: Facts) -> str:
    if not facts.private:
        return "There is no mechanism."
    return (
        "Sampling, clipping, noise and divisor are held by fedfuse's tests, each of which was seen "
        "to fail on a planted fault (docs/privacy.md). A figure shows what the mechanism costs "
        f"that the books name; it cannot show that the code ran it. Noise below {LEAST_SIGMA:g} C "
        "is refused."
    )


def _randomness(facts: Facts) -> str:
    if not facts.private:
        return "Of no matter: there is no noise."
    if facts.config is None:
        return "Each run's own report says where its noise came from; the ledger does not."
    if facts.config.privacy.noise_seed:
        return (
            "SEEDED: sampling and noise follow from privacy.noise_seed. Whoever knows it can take "
            "the noise off, and then no figure here holds against them."
        )
    return (
        "Sampling and noise come from AES-256 under secrets of the operating system, anew for "
        "each node and round; the seed of the model never reaches them."
    )
