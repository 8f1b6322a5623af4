"""Where and how the ranks of an application meet: what its settings say.

* `spark.driver.host`: where ranks find the driver, and `spark.driver.bindAddress`: where the driver
  listens, if that is another address.
* `spark.tfspark.ports`, such as `40000-40100`: where ranks and driver listen.
* `spark.network.crypto.enabled`: what they send each other is encrypted, as Spark's own traffic.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyspark import BarrierTaskContext, SparkContext

from tfspark.errors import InvalidInputError
from tfspark.slots import settings_of
from tfspark.sync.encryption import Identity
from tfspark.sync.member import Member
from tfspark.sync.rendezvous import Rendezvous

PORTS = "spark.tfspark.ports"
ENCRYPTION = "spark.network.crypto.enabled"


@dataclass(frozen=True)
class Invitation:
    """What a rank has to know to join; Spark carries it, with the task.

    Attributes:
        address: of the rendezvous.
        token: its secret.
        identity: of the run, where connections are encrypted.
        ports: where ranks listen; None lets the system choose.
    """

    address: tuple[str, int]
    token: str = field(repr=False)
    identity: Identity | None
    ports: range | None

    def join(self, rank: int, num_ranks: int, timeout_s: float) -> Member:
        """Meets all other ranks; called in the barrier task of a rank. See `Member.join`."""
        # A rank listens at the address that Spark knows its executor by, and at no other.
        address = BarrierTaskContext.get().getTaskInfos()[rank].address
        return Member.join(
            self.address,
            self.token,
            rank,
            0,
            num_ranks,
            bind_host=address.rpartition(":")[0],
            ports=self.ports,
            timeout_s=timeout_s,
            identity=self.identity,
        )


@dataclass(frozen=True)
class MeetingPlace:
    """See the module's docstring.

    Attributes:
        host: of the driver, as ranks reach it.
        bind_host: where the driver listens.
        ports: the first free one is listened at; None lets the system choose.
        identity: of the run, where connections are encrypted.
    """

    host: str
    bind_host: str
    ports: range | None
    identity: Identity | None

    @classmethod
    def of(cls, context: SparkContext) -> MeetingPlace:
        """As the application is configured.

        Raises:
            InvalidInputError: `spark.tfspark.ports` is no range of ports.
            MissingExtraError: encryption is on, and the package for it is missing.
        """
        settings = settings_of(context)
        host = str(settings.get("spark.driver.host"))
        return cls(
            host,
            str(settings.get("spark.driver.bindAddress", host)),
            port_range(settings.get(PORTS)),
            Identity.make() if settings.get(ENCRYPTION) == "true" else None,
        )

    def open(
        self, num_ranks: int, on_report: Callable[[int, dict[str, Any]], None]
    ) -> tuple[Rendezvous, Callable[[], Invitation]]:
        """A rendezvous with a secret of its own, and the invitation to it once it listens."""
        token = secrets.token_hex(32)
        meeting = Rendezvous(
            self.host,
            num_ranks,
            token=token,
            on_report=on_report,
            bind_host=self.bind_host,
            ports=self.ports,
            identity=self.identity,
        )
        return meeting, lambda: Invitation(meeting.address, token, self.identity, self.ports)


def port_range(setting: str | None) -> range | None:
    """The ports of a setting such as "40000-40100" or "40000"; None lets the system choose.

    Raises:
        InvalidInputError: it is no range of ports.
    """
    if setting is None:
        return None
    first, _, last = setting.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or not (ports[0] > 0 and ports[-1] < 2**16):
        raise InvalidInputError(
            f"{PORTS} is a port or a range such as '40000-40100', with one port for the driver and "
            f"one for every rank of a host. Received: {setting!r}."
        )
    return ports
