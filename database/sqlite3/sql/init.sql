-- The tables that a new database starts with: what the job service in docs/examples needs.
-- Run at the first connection of every pool; each script may run any number of times.
-- Point `init_sql` of config/database.yaml at a file of your own, or at "" for none.

-- name: create_jobs#
-- Jobs, and when each is due. `updated_at` follows every UPDATE by itself, whichever statement made it.
CREATE TABLE IF NOT EXISTS jobs (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    cron_expr  TEXT NOT NULL,
    handler    TEXT NOT NULL,
    enabled    INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TRIGGER IF NOT EXISTS jobs_updated_at AFTER UPDATE ON jobs WHEN NEW.updated_at = OLD.updated_at
BEGIN
    UPDATE jobs SET updated_at = CURRENT_TIMESTAMP WHERE id = NEW.id;
END;

-- name: create_job_runs#
-- One row for each time that a job is to run, is running, or has run.
CREATE TABLE IF NOT EXISTS job_runs (
    id          INTEGER PRIMARY KEY,
    job_id      INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    state       TEXT NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed')),
    worker      TEXT,
    queued_at   TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    started_at  TEXT,
    finished_at TEXT,
    output      TEXT
);
CREATE INDEX IF NOT EXISTS job_runs_by_state ON job_runs (state);
CREATE INDEX IF NOT EXISTS job_runs_by_job ON job_runs (job_id);
