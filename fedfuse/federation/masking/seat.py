"""A node's place in masked rounds: it answers the stages, and gives its update only under masks.

The node's identity and those of the others come from its own settings, never from the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedfuse.errors import PrivacyError, WireError
from fedfuse.federation.masking.member import Member
from fedfuse.federation.masking.messages import Parts, from_config, terms_from_config, to_config
from fedfuse.federation.masking.quantise import Lattice
from fedfuse.federation.masking.terms import Terms, colluders, threshold_for
from fedfuse.federation.masking.unfinished import Unfinished
from fedfuse.federation.policy import scrubbed
from fedfuse.federation.wire import CONFIG, Template, TrainRequest, Weights, encode
from fedfuse.privacy.central import clipped_vector
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Unit
from fedfuse.train import Job

__all__ = ["VECTOR", "Seat", "StageReply", "lattice_of", "masked_template"]

VECTOR = "masked"
"""The one array of a masked update."""
_log = logging.getLogger("fedfuse.node")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReply:
    """A node's answer to a message of masks."""

    stage: str
    request: str = ""
    parts: Parts = field(default_factory=dict)
    problem: str = ""
    """Why it is refused, scrubbed."""

    @property
    def status(self) -> str:
        """As in a TrainReply."""
        return "refused" if self.problem else "ok"

    def to_record(self) -> RecordDict:
        """The message."""
        if self.problem:
            told = ConfigRecord({"stage": self.stage, "problem": self.problem})
        else:
            told = to_config(self.stage, self.request, self.parts)
        return RecordDict({CONFIG: told})


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One node's place."""

    name: str
    key: SigningKey
    identities: Mapping[str, str]
    """By name, the public keys of all nodes."""
    digest: str
    """Of the public configuration, as this node has it."""
    clip_norm: float
    """C where the run promises nothing: longer updates are cut to it."""
    unfinished: Unfinished
    """What is kept between messages."""
    servers: frozenset[str] | None = None
    """Public keys; terms must be signed by one of them. None: by nobody in particular."""
    colluders: int = 0
    """How many of the other nodes may work together with the server, as this one sees it."""

    def answer(self, record: RecordDict) -> StageReply:
        """The node's answer to a message of masks; of an error only what is scrubbed leaves."""
        stage = "announce"
        try:
            if set(record) != {CONFIG} or len(record.config_records) != 1:
                raise WireError("a message of masks is one config record")
            config = dict(record.config_records[CONFIG])
            stage = str(config.get("stage"))[:40]
            reply = self._staged(stage, config)
            _log.info("%s, masks, stage %s: answered", self.name, stage)
            return reply
        except Exception as error:
            _log.warning("%s, masks, stage %s: %s", self.name, stage, error, exc_info=error)
            return StageReply(stage=stage, problem=scrubbed(error))

    def check(self, request: TrainRequest) -> None:
        """Raises where the update that is asked for could not leave under masks, or not safely.

        Changes nothing, so that it can be asked before anything is spent. WireError: the masks
        are not there, or for something else; PrivacyError: too little noise could be in a sum.
        """
        job, mechanism = request.job, request.job.mechanism
        member = self.unfinished.find(request.request)
        terms = member.terms
        if member.next != "mask":
            raise WireError(f"masks at stage {member.next}, but an update is asked for")
        if terms.digest != request.digest or terms.length != request.parameters:
            raise WireError("the masks that this node agreed on are for another run")
        if mechanism is not None and (mechanism.unit is not Unit.NODE or mechanism.count_noise):
            raise PrivacyError("under masks a node gives one update of its own, and no count")
        # Without noise a sum must hold another update than those of this node and of liars.
        needed = job.noise_nodes if mechanism is not None else 2
        bad = colluders(len(terms.nodes), terms.threshold, needed)
        if bad < self.colluders:
            raise PrivacyError(
                f"a sum may be of {terms.threshold} of {len(terms.nodes)} updates, of which "
                f"{needed} must be honest, and this node expects up to {self.colluders} others "
                "that are not",
                hint="ask more nodes, or lower privacy.noise_nodes; masks.colluders in node.toml",
            )

    def masked(
        self,
        request: TrainRequest,
        start: Weights,
        end: Weights,
        trained: Iterable[str],
        secret: bytes,
    ) -> ArrayRecord:
        """The update from `start` to `end` as it leaves: clipped, in steps, noised, masked.

        Raises as `check`.
        """
        self.check(request)
        member = self.unfinished.take(request.request)
        terms = member.terms
        lattice = lattice_of(
            request.job,
            clip_norm=self.clip_norm,
            length=terms.length,
            nodes=len(terms.nodes),
        )
        update = clipped_vector(start, end, trained, lattice.clip_norm)
        steps = lattice.whole(
            update, rounding=NoiseStream(secret, "rounding"), noise=NoiseStream(secret, "noise")
        )
        vector: NDArray[np.generic] = member.mask(steps)
        self.unfinished.keep(member)
        return encode({VECTOR: vector})

    def _staged(self, stage: str, config: Mapping[str, object]) -> StageReply:
        if stage == "announce":
            terms, server = terms_from_config(config)
            self._check_terms(terms, server)
            member = Member(terms, self.name, self.key, self.identities)
            self.unfinished.begin(terms.request)
            parts: Parts = {self.name: member.announce()}
        else:
            member = self.unfinished.take(str(config.get("request"))[:40])
            parts = self._next(member, stage, from_config(config, stage, member.terms))
        if stage != "reveal":
            self.unfinished.keep(member)
        return StageReply(stage=stage, request=member.terms.request, parts=parts)

    def _check_terms(self, terms: Terms, server: str) -> None:
        """Raises WireError where these terms do not protect this node, or come from a stranger."""
        if self.servers is not None and server not in self.servers:
            raise WireError("the terms of masks are not signed by a server that this node answers")
        if terms.digest != self.digest:
            raise WireError("the masks are for a run of another configuration")
        n = len(terms.nodes)
        if terms.threshold < threshold_for(n) or colluders(n, terms.threshold) < self.colluders:
            raise WireError(
                f"threshold {terms.threshold} of {n} nodes: too few to protect against a server "
                f"that lies, with {self.colluders} nodes on its side"
            )
        if self.name not in terms.nodes:
            raise WireError("this node is not among those that share masks")

    def _next(self, member: Member, stage: str, told: Parts) -> Parts:
        match stage:
            case "share":
                return member.share(told)
            case "open":
                member.open(told)
                return {}
            case "agree":
                return {self.name: member.agree(told)}
            case "reveal":
                return member.reveal(told)
        raise WireError("no such stage of masks")


def lattice_of(job: Job, *, clip_norm: float, length: int, nodes: int) -> Lattice:
    """The lattice of a round, the same on both sides; `clip_norm`: where nothing is promised."""
    mechanism = job.mechanism
    if mechanism is None:
        return Lattice.of(clip_norm=clip_norm, length=length, nodes=nodes)
    return Lattice.of(
        clip_norm=mechanism.clip_norm,
        length=length,
        nodes=nodes,
        noise_multiplier=mechanism.noise_multiplier,
        noise_nodes=job.noise_nodes,
    )


def masked_template(length: int) -> Template:
    """What a masked update must look like."""
    return {VECTOR: ((length,), "uint32")}
