"""The worth of a kept customer and the cost of an offer, as a data set's config says in its section ``value``."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

KEPT_RULE = "is a number, {column: NAME} or {amount_of_days: DAYS}, one of these"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class KeptCustomer(_Frozen):
    """The worth of a customer who is kept, by one of three sources; a bare number in the config is ``number``.

    `closedloop.core.evaluation.profit.read_kept` reads it from feature rows.
    """

    number: float | None = Field(None, gt=0, description="The same for every customer.")
    column: str | None = Field(None, description="A numeric attribute; a missing one counts as 0.")
    amount_of_days: int | None = Field(
        None, ge=1, description="The amounts of the events in this many days before the snapshot, a window feature."
    )
    share: float = Field(1.0, gt=0, description="The part of the column or the amount that counts, such as a margin.")

    @model_validator(mode="after")
    def _one_source_is_given(self) -> Self:
        given = [one for one in (self.number, self.column, self.amount_of_days) if one is not None]
        if len(given) != 1 or (self.number is not None and self.share != 1):
            raise ValueError(f"{KEPT_RULE}; the last two may have a share")
        return self


class CustomerValue(_Frozen):
    """The value of keeping a customer, in the currency of the data set's amounts.

    An offer to a customer who would leave keeps this customer with ``save_rate``; an offer to one who would stay
    changes nothing. Each offer costs ``offer_cost``.
    """

    kept: KeptCustomer = Field(description="What a customer who is kept is worth.")
    offer_cost: float = Field(ge=0, description="What one offer costs, whoever gets it.")
    save_rate: float = Field(gt=0, le=1, description="Share of leaving customers whom an offer keeps.")
    capacity: int | None = Field(None, ge=1, description="Offers that can be made in a cycle; null: no limit.")

    @field_validator("kept", mode="before")
    @classmethod
    def _a_number_is_for_every_customer(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"number": value}
        if not isinstance(value, dict | KeptCustomer):
            raise ValueError(KEPT_RULE)
        return value
