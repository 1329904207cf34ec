"""A node's place in masked rounds: it answers the stages, and gives its update only under masks.

What the protocol needs from one message to the next lies in the state that Flower keeps for the
node; the node's identity and those of the others come from its own settings, never from the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedfuse.errors import WireError
from fedfuse.federation.masking.member import Member
from fedfuse.federation.masking.messages import from_config, terms_from_config, to_config
from fedfuse.federation.masking.quantise import Lattice
from fedfuse.federation.masking.terms import colluders, threshold_for
from fedfuse.federation.policy import scrubbed
from fedfuse.federation.wire import CONFIG, Template, TrainRequest, Weights, encode
from fedfuse.privacy.central import clipped_vector
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.signing import SigningKey
from fedfuse.train import Job

__all__ = ["VECTOR", "Seat", "lattice_of", "masked_template"]

VECTOR = "masked"
"""The one array of a masked update."""
_STATE, _MEMBER = "fedfuse.masks", "member"
_log = logging.getLogger("fedfuse.node")


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
    state: RecordDict
    """What is kept for the node between messages."""

    def answer(self, record: RecordDict) -> RecordDict:
        """The node's answer to a message of masks; of an error only what is scrubbed leaves."""
        stage = "announce"
        try:
            if set(record) != {CONFIG}:
                raise WireError("a message of masks is one config record")
            config = dict(record.config_records[CONFIG])
            stage = str(config.get("stage"))[:40]
            return RecordDict({CONFIG: self._staged(stage, config)})
        except Exception as error:
            _log.warning("%s, masks, stage %s: %s", self.name, stage, error, exc_info=error)
            return RecordDict({CONFIG: ConfigRecord({"stage": stage, "problem": scrubbed(error)})})

    def masked(
        self,
        request: TrainRequest,
        start: Weights,
        end: Weights,
        trained: Iterable[str],
        secret: bytes,
    ) -> ArrayRecord:
        """The update from `start` to `end` as it leaves: clipped, in steps, noised, masked.

        Raises WireError where the masks that the node has agreed on are not for this request, or
        a sum under them could carry too little noise.
        """
        member = self._member()
        if member.terms.request != request.request:
            raise WireError("the masks that this node agreed on are for another request")
        terms, shares = member.terms, request.job.noise_nodes
        if request.job.mechanism and colluders(len(terms.nodes), terms.threshold, shares) < 0:
            raise WireError(
                f"{shares} shares make the noise whole, but a sum may be of {terms.threshold}"
            )
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
        self._keep(member)
        return encode({VECTOR: vector})

    def _staged(self, stage: str, config: Mapping[str, object]) -> ConfigRecord:
        if stage == "announce":
            terms = terms_from_config(config)
            if terms.digest != self.digest:
                raise WireError("the masks are for a run of another configuration")
            if terms.threshold < threshold_for(len(terms.nodes)):
                raise WireError(
                    f"threshold {terms.threshold} of {len(terms.nodes)} nodes: too few to protect "
                    "against a server that lies"
                )
            if self.name not in terms.nodes:
                raise WireError("this node is not among those that share masks")
            member = Member(terms, self.name, self.key, self.identities)
            parts = {self.name: member.announce()}
        else:
            member = self._member()
            told = from_config(config, stage, member.terms)
            match stage:
                case "share":
                    parts = member.share(told)
                case "open":
                    member.open(told)
                    parts = {}
                case "agree":
                    parts = {self.name: member.agree(told)}
                case "reveal":
                    parts = member.reveal(told)
                case _:
                    raise WireError("no such stage of masks")
        self._keep(member)
        return to_config(stage, parts)

    def _member(self) -> Member:
        """The protocol's run where it is; taken away, so that a refusal ends it."""
        kept = self.state.config_records.get(_STATE)
        if kept is None:
            raise WireError("this node has agreed on no masks")
        del self.state[_STATE]
        saved = kept[_MEMBER]
        assert isinstance(saved, bytes)
        return Member.load(saved, self.name, self.key, self.identities)

    def _keep(self, member: Member) -> None:
        self.state[_STATE] = ConfigRecord({_MEMBER: member.save()})


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
