"""The first schema of the store.

Revision: 0001, follows none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEYS = {
    "memberships": ("version",),
    "approvals": ("number", "study, site, digest"),
    "releases": ("number", "study, digest"),
    "attempts": ("study, round, attempt",),
    "updates": ("study, round, site",),
    "receipts": ("number", "study, round, site, digest"),
    "records": ("study, round",),
    "counted": ("study, round, site",),
}
# of the tables whose rows never change


def upgrade() -> None:
    """Make every table, and the triggers that guard those whose rows never change."""
    _create_tables()
    if op.get_bind().dialect.name == "sqlite":
        _guard_in_sqlite()
    else:
        _guard_in_postgresql()


def _guard_in_sqlite() -> None:
    for table, keys in _KEYS.items():
        said = f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
        op.execute(f"CREATE TRIGGER {table}_never_change BEFORE UPDATE ON {table} {said}")
        op.execute(f"CREATE TRIGGER {table}_never_go BEFORE DELETE ON {table} {said}")
        # INSERT OR REPLACE deletes without the trigger above.
        same = " OR ".join(
            f"({key}) = ({', '.join(f'NEW.{name}' for name in key.split(', '))})" for key in keys
        )
        there = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 - the names above
        op.execute(
            f"CREATE TRIGGER {table}_only_follow BEFORE INSERT ON {table} WHEN {there} {said}"
        )


def _guard_in_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION huizhen_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% are append-only', TG_TABLE_NAME; END $$"
    )
    for table in _KEYS:
        op.execute(
            f"CREATE TRIGGER {table}_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION huizhen_append_only()"
        )


def _create_tables() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("log", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("root", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("received", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("log", "size", name="pk_audit_heads"),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("issued", sa.String(), nullable=False),
        sa.Column("not_after", sa.String(), nullable=False),
        sa.Column("revoked", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("serial", name="pk_certificates"),
    )
    op.create_index("ix_certificates_site", "certificates", ["site"], unique=False)
    op.create_table(
        "invitations",
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("made", sa.String(), nullable=False),
        sa.Column("expires", sa.String(), nullable=False),
        sa.Column("used", sa.String(), nullable=True),
        sa.Column("key", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("token", name="pk_invitations"),
    )
    op.create_table(
        "memberships",
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("received", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_memberships"),
    )
    op.create_table(
        "site_status",
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("codes", sa.String(), nullable=False),
        sa.Column("clock_skew_seconds", sa.Float(), nullable=False),
        sa.Column("seen", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_site_status"),
    )
    op.create_table(
        "studies",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("proposed", sa.String(), nullable=False),
        sa.Column("changed", sa.String(), nullable=False),
        sa.CheckConstraint(
            "state IN ('proposed', 'open', 'paused', 'finished', 'closed')", name="ck_studies_state"
        ),
        sa.PrimaryKeyConstraint("digest", name="pk_studies"),
    )
    op.create_table(
        "approvals",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("issued", sa.String(), nullable=False),
        sa.Column("received", sa.String(), nullable=False),
        sa.CheckConstraint("kind IN ('approval', 'withdrawal')", name="ck_approvals_kind"),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_approvals_studies"),
        sa.PrimaryKeyConstraint("number", name="pk_approvals"),
        sa.UniqueConstraint("study", "site", "digest", name="uq_approvals_study_site_digest"),
    )
    op.create_table(
        "attempts",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("announcement", sa.LargeBinary(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("opened", sa.String(), nullable=False),
        sa.Column("deadline", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_attempts_studies"),
        sa.PrimaryKeyConstraint("study", "round", "attempt", name="pk_attempts"),
    )
    op.create_table(
        "leases",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("until", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_leases_studies"),
        sa.PrimaryKeyConstraint("study", name="pk_leases"),
    )
    op.create_table(
        "progress",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("reported", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_progress_studies"),
        sa.PrimaryKeyConstraint("study", "site", name="pk_progress"),
    )
    op.create_table(
        "receipts",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("payload", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_receipts_studies"),
        sa.PrimaryKeyConstraint("number", name="pk_receipts"),
        sa.UniqueConstraint(
            "study", "round", "site", "digest", name="uq_receipts_study_round_site_digest"
        ),
    )
    op.create_index("ix_receipts_site_number", "receipts", ["site", "number"], unique=False)
    op.create_table(
        "refusals",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(), nullable=True),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("payload", sa.String(), nullable=True),
        sa.Column("received", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_refusals_studies"),
        sa.PrimaryKeyConstraint("number", name="pk_refusals"),
    )
    op.create_index("ix_refusals_study_round", "refusals", ["study", "round"], unique=False)
    op.create_table(
        "releases",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("made", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_releases_studies"),
        sa.PrimaryKeyConstraint("number", name="pk_releases"),
        sa.UniqueConstraint("study", "digest", name="uq_releases_study_digest"),
    )
    op.create_table(
        "records",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("parent", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("strategy_state", sa.String(), nullable=False),
        sa.Column("committed", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "round", "attempt"],
            ["attempts.study", "attempts.round", "attempts.attempt"],
            name="fk_records_attempts",
        ),
        sa.ForeignKeyConstraint(["study"], ["studies.digest"], name="fk_records_studies"),
        sa.PrimaryKeyConstraint("study", "round", name="pk_records"),
    )
    op.create_table(
        "updates",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("payload", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("received", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "round", "attempt"],
            ["attempts.study", "attempts.round", "attempts.attempt"],
            name="fk_updates_attempts",
        ),
        sa.PrimaryKeyConstraint("study", "round", "site", name="pk_updates"),
    )
    op.create_table(
        "counted",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "round", "site"],
            ["updates.study", "updates.round", "updates.site"],
            name="fk_counted_updates",
        ),
        sa.ForeignKeyConstraint(
            ["study", "round"], ["records.study", "records.round"], name="fk_counted_records"
        ),
        sa.PrimaryKeyConstraint("study", "round", "site", name="pk_counted"),
    )
