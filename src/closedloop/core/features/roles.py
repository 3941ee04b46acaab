"""Guess which column of a strange table plays which role; every guess comes with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from closedloop.core.features.profiles import Profile, simplify_name
from closedloop.errors import DataError, count_noun

# of names as `simplify_name` writes them: it takes the marks from voiced kana, so that フラグ is written フラク
PERSON = (
    r"customer|client|kunde|member|mitglied|user|account|konto|subscriber|msisdn|person|patient|employee|cliente"
    r"|会員|顧客|契約者|利用者"
)
NUMBERED = r"_ids?_|id_$|_nr_|_no_|nummer_|number_$|_uuid_|_guid_|_key_|^_index_$|番号"
LABEL = (
    r"churn|attrit|_left_|leaver|_leaves?_|exited|kundig|kuendig|abgang|abwander|abgewandert|resili|_baja_|ausgetreten"
    r"|gegangen|_gone_|解約|退会|離脱|離反"
)
LABEL_WEAK = (
    r"_target_|_label_|_y_|_class_|_outcome_|_response_|_status_|cancel|_closed_|inactiv|inaktiv|default|unsubscri"
    r"|terminat|_lost_|_quit_|depart|abandon|verlassen|_exit_"
)
STAYS = r"retain|retention|_active_|_is_active|_aktiv_|renew|stayed|geblieben|loyal|継続|在籍"
SENSITIVE = r"gender|_sex_|geschlecht|race|ethnic|religion|nationality|nationalitat|genre|_sexo_|性別|国籍"
CODE = (
    r"_code_|_plz_|_zip|postal|postleit|_type_|_typ_|region|segment|_class_|kategorie|category|_group_|gruppe|_flag_"
    r"|district|郵便|区分|種別|地域"
)
AMOUNT = (
    r"amount|price|preis|betrag|umsatz|revenue|value|_total_|_sum_|summe|cost|montant|prix|importe|precio|spend|paid"
    r"|sales_$|金額|料金|価格|単価|売上"
)
WHOLE_AMOUNT = r"amount|betrag|umsatz|revenue|_total_|_sum_|summe|montant|spend|paid|金額|売上"
QUANTITY = r"quantity|_qty_|menge|anzahl|_units?_|stuck|quantite|cantidad|数量|個数|点数"
EVENT_TYPE = r"event|_action_|aktion|activity|_type_|_typ_|_kind_|ereignis|種別|種類"
EVENT_TIME = r"time|date|datum|_at_|zeit|_ts_|fecha|_day_|_tag_|日時|日付|時刻|年月日|日_$"
# of values
YES = {"yes", "y", "true", "t", "1", "ja", "j", "wahr", "oui", "o", "vrai", "si", "s", "sim", "x"}
YES |= {"はい", "有", "あり", "○"}
NO = {"no", "n", "false", "f", "0", "nein", "falsch", "non", "faux", "nao", "いいえ", "無", "なし", "\u00d7"}
GONE = re.compile(
    r"churn|attrit|left|leaver|exit|cancel|closed|inactiv|inaktiv|gone|lost|quit|gekundigt|gekuendigt|ausgetreten|terminat"
    r"|解約|退会|離脱|離反"
)
HERE = re.compile(
    r"stay|exist|^activ|^aktiv|current|retain|loyal|joined|remain|open|geblieben|bestand|継続|在籍|契約中"
)
CATEGORIES_MAX, EVENT_TYPES_MAX, ROWS_AN_ID_MIN = 50, 20, 1.5


@dataclass
class Roles:
    """Which columns do what; ``left_out`` and ``notes`` say why, by column."""

    kind: Literal["events", "table"]
    entity_id: str | None = None
    time: str | None = None
    label: str | None = None
    churned: tuple[str, ...] = ()
    stayed: tuple[str, ...] = ()
    numeric: list[str] = field(default_factory=list)
    categorical: list[str] = field(default_factory=list)
    sensitive: str | None = None
    amount: str | None = None
    quantity: str | None = None
    event_type: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def guess_roles(profiles: Mapping[str, Profile], *, label: str | None = None) -> Roles:
    """Roles of all columns; ``label`` names the label's column where the caller knows it.

    Raises
    ------
    DataError
        If no column can be the label, and the rows are no log of events; or ``label`` cannot be one.
    """
    if label is not None and label not in profiles:
        raise DataError(f"--label {label!r}: no such column; its columns: {', '.join(profiles)}")
    ids = {name: score for name, one in profiles.items() if (score := _score_id(one)) > 0}
    repeated = [name for name in ids if _count_rows_an_id(profiles[name]) >= ROWS_AN_ID_MIN]
    times = [name for name, one in profiles.items() if one.kind == "time" and not one.trouble and one.different > 2]
    labels = _rank_labels(profiles, label)
    surest = labels[0][0] if labels else 0
    if label is None and surest < 2 and repeated and times:
        return _guess_log(profiles, max(repeated, key=lambda name: ids[name]), times)
    roles = Roles("table")
    roles.label, roles.churned, roles.stayed = _choose_label(profiles, labels, label, roles.notes)
    unique = [name for name in ids if profiles[name].is_id_like and name != roles.label]
    dated = [name for name in repeated if name != roles.label and ids[name] > 1] if times and not unique else []
    roles.entity_id = max(unique or dated, key=lambda name: ids[name], default=None)
    if dated and roles.entity_id is not None:
        roles.time = max(times, key=lambda name: bool(re.search(EVENT_TIME, simplify_name(name))))
    if roles.entity_id is None:
        roles.notes.append("no column is an identifier: the rows are numbered, and a prediction needs its features")
    for one in profiles.values():
        if one.name not in (roles.label, roles.entity_id, roles.time):
            _place_attribute(roles, one)
    return roles


def _score_id(one: Profile) -> float:
    name = simplify_name(one.name)
    if one.trouble or one.kind not in ("text", "number") or (one.kind == "number" and not one.is_whole):
        return 0
    score = bool(re.search(PERSON, name)) + bool(re.search(NUMBERED, name)) * 1.5
    return score + (0.5 if one.is_id_like and one.missing == 0 and (one.kind == "text" or score) else 0)


def _count_rows_an_id(one: Profile) -> float:
    return (one.rows - one.missing) / max(one.different, 1)


def _rank_labels(profiles: Mapping[str, Profile], wanted: str | None) -> list[tuple[int, str]]:
    """(how sure, column), the surest first; of equals one of yes and no, then one without blanks, then the last."""
    found: list[tuple[int, bool, int, int, str]] = []
    for one in profiles.values():
        if wanted not in (None, one.name) or one.different < 2 or one.kind not in ("text", "number"):
            continue
        name, sides = simplify_name(one.name), _find_sides(one)
        if sides is None:
            continue
        named = 2 if re.search(LABEL, name) else 1 if re.search(f"{LABEL_WEAK}|{STAYS}", name) else 0
        told = 2 if all(re.search(LABEL, simplify_name(text)) for text in sides[0]) else 0
        found.append((max(named, told), sides[2], -one.missing, len(found), one.name))
    return [(score, name) for score, *_, name in sorted(found, reverse=True)]


def _fold(text: str) -> str:
    return simplify_name(text).strip("_") or text


def _find_sides(one: Profile) -> tuple[tuple[str, ...], tuple[str, ...], bool] | None:
    """The values that mean churned and stayed, and whether they say so; None if they are not two kinds."""
    if one.different > 8:
        return None
    flipped = re.search(STAYS, simplify_name(one.name)) and not re.search(LABEL, simplify_name(one.name))
    gone, here = (NO, YES) if flipped else (YES, NO)
    churned = tuple(text for text in one.values if _fold(text) in gone or GONE.search(_fold(text)))
    stayed = tuple(
        text for text in one.values if text not in churned and (_fold(text) in here or HERE.search(_fold(text)))
    )
    if churned and stayed and len(churned) + len(stayed) == one.different:
        return churned, stayed, True
    return None if one.different != 2 else (one.values[1:], one.values[:1], False)


def _choose_label(
    profiles: Mapping[str, Profile], labels: Sequence[tuple[int, str]], wanted: str | None, notes: list[str]
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    surest = [name for score, name in labels if score == labels[0][0]]
    if not surest or (wanted is None and labels[0][0] == 0 and len(surest) > 1):
        raise DataError(_explain_no_label(profiles, surest, wanted))
    chosen = profiles[surest[0]]
    churned, stayed, is_told = _find_sides(chosen) or ((), (), False)  # the ranking holds only columns that have two
    if wanted is None and len(surest) > 1:
        others = ", ".join(map(repr, surest[1:]))
        notes.append(f"{chosen.name!r} is taken for the label; {others} could be it too: --label COLUMN names another")
    if not is_told:
        notes.append(
            f"{chosen.name!r}: which of {churned[0]!r} and {stayed[0]!r} means churned does not stand there: check "
            "columns.label"
        )
    return chosen.name, churned, stayed


def _explain_no_label(profiles: Mapping[str, Profile], candidates: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        shown = ", ".join(map(repr, profiles[wanted].values[:6]))
        return f"--label {wanted!r}: a label has two values (such as yes and no) and no blanks; found {shown or 'none'}"
    named = [one for one in profiles.values() if re.search(LABEL, simplify_name(one.name))]
    if named:
        held = "; ".join(
            f"{one.name!r} holds {', '.join(map(repr, one.values[:4])) or 'nothing'}"
            + (f" and {count_noun(one.missing, 'blank')}" if one.missing else "")
            for one in named
        )
        return f"no column can be the label: {held}. A label has two values in words: write both out, as yes and no"
    if candidates:
        return (
            f"which column is the label? With two values: {', '.join(map(repr, candidates))}. Name it: --label COLUMN"
        )
    return (
        "no column has two values, so that none can be the label (who left, who stayed), and no id repeats beside a "
        "time, so that it is no log of events"
    )


def _place_attribute(roles: Roles, one: Profile) -> None:
    """Make a column a feature, or say why it is none."""
    name, shown = simplify_name(one.name), count_noun(one.different, "different value")
    if one.trouble:
        roles.left_out[one.name] = one.trouble
    elif one.kind == "time":
        roles.left_out[one.name] = "a date is no feature; the number of days from it to the row's day could be one"
    elif re.search(LABEL, name):
        roles.left_out[one.name] = "its name says that it comes from the label: a leak, unless it is known before"
    elif re.search(SENSITIVE, name) and one.different <= CATEGORIES_MAX:
        if roles.sensitive is None:
            roles.sensitive = one.name
        else:
            roles.left_out[one.name] = f"sensitive as {roles.sensitive!r} is, and one column can be"
    elif one.is_id_like and one.rows > 20 and (one.kind == "text" or re.search(f"{NUMBERED}|{PERSON}", name)):
        roles.left_out[one.name] = f"an identifier or free text: {shown} in {count_noun(one.rows, 'row')}"
    elif one.kind == "number" and one.different > 2 and not (re.search(CODE, name) and one.different <= CATEGORIES_MAX):
        roles.numeric.append(one.name)
    elif one.different <= CATEGORIES_MAX:
        roles.categorical.append(one.name)
    else:
        roles.left_out[one.name] = f"too many texts for categories: {shown}"


def _guess_log(profiles: Mapping[str, Profile], entity_id: str, times: Sequence[str]) -> Roles:
    roles = Roles("events", entity_id=entity_id)
    roles.time = max(
        times, key=lambda name: (bool(re.search(EVENT_TIME, simplify_name(name))), profiles[name].different)
    )
    rest = [one for one in profiles.values() if one.name not in (entity_id, roles.time)]
    usable = {one.name: simplify_name(one.name) for one in rest if not one.trouble}
    numbers = [one.name for one in rest if one.kind == "number" and not one.trouble and not one.is_id_like]
    roles.amount = next((name for name in numbers if re.search(AMOUNT, usable[name])), None)
    if roles.amount is not None and not re.search(WHOLE_AMOUNT, usable[roles.amount]):
        roles.quantity = next((name for name in numbers if re.search(QUANTITY, usable[name])), None)
    types = [one.name for one in rest if one.kind == "text" and not one.trouble and one.different <= EVENT_TYPES_MAX]
    roles.event_type = next((name for name in types if re.search(EVENT_TYPE, usable[name])), None)
    roles.label = _choose_event(profiles[roles.event_type].values if roles.event_type else (), roles.amount)
    for one in rest:
        if one.name not in (roles.amount, roles.quantity, roles.event_type):
            roles.left_out[one.name] = (
                one.trouble or "no role in a log; what describes a customer comes from customers_source"
            )
    return roles


def _choose_event(types: Sequence[str], amount: str | None) -> str:
    """The type of event whose absence is churn."""
    usual = "purchase" if amount else "event"
    if not types:
        return usual
    bought = re.compile(r"purchas|order|buy|kauf|sale|transact|bestell|payment|zahlung|achat|compra")
    return next((text for text in types if bought.search(text.casefold())), types[0])


def choose_horizon(times: pd.Series, ids: pd.Series) -> int:
    """Days without an event after which a customer counts as gone: beyond most gaps, and short beside the log.

    Raises
    ------
    DataError
        If the log covers too few days.
    """
    span = (times.max() - times.min()).days
    gaps = times.sort_values().groupby(ids).diff().dropna().dt.total_seconds() / 86_400
    usual = float(gaps[gaps >= 1].quantile(0.9)) if (gaps >= 1).any() else 1.0
    most = span // 8
    if most < 1:
        raise DataError(f"the log covers {count_noun(span, 'day')}: windows, label and test need at least 8")
    fits = [days for days in (1, 2, 3, 5, 7, 10, 14, 21, 30, 45, 60, 90) if days <= most]
    return next((days for days in fits if days >= usual), fits[-1])
