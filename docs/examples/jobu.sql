-- The queries of the job service (jobu.py), in aiosql's form: name, operator, statement. They are in the SQL that SQLite
-- and PostgreSQL have in common.
-- ^ one row or none; $ one value; ! number of rows; <! the new row's id; *! many rows; none: all rows

-- name: get_job_by_id^
SELECT * FROM jobs WHERE id = :id;
-- name: get_all_jobs
SELECT * FROM jobs WHERE enabled = :enabled;
-- name: insert_job<!
INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler);
-- name: update_job!
UPDATE jobs SET enabled = :enabled WHERE id = :id;
-- name: delete_job!
DELETE FROM jobs WHERE id = :id;

-- name: count_jobs$
SELECT count(*) FROM jobs;

-- name: upsert_job*!
-- A job that stands in the table as it stands in the crontab is left alone and not counted.
INSERT INTO jobs (name, cron_expr, handler) VALUES (:name, :cron_expr, :handler)
ON CONFLICT (name) DO UPDATE
SET cron_expr = excluded.cron_expr, handler = excluded.handler, enabled = 1
WHERE (jobs.cron_expr, jobs.handler, jobs.enabled) <> (excluded.cron_expr, excluded.handler, 1);

-- name: disable_job*!
UPDATE jobs SET enabled = 0 WHERE name = :name;

-- name: requeue_unfinished_runs!
UPDATE job_runs SET state = 'queued', worker = NULL, started_at = NULL WHERE state = 'running';

-- name: enqueue_run*!
INSERT INTO job_runs (job_id) VALUES (:job_id);

-- name: claim_run^
-- One statement looks and takes, so no two workers can take the same run. Where there are several writers, the second
-- one finds the run taken by the time that it gets it; it looks at the state once more, and comes again.
UPDATE job_runs
SET state = 'running', worker = :worker, started_at = CURRENT_TIMESTAMP
WHERE state = 'queued' AND id = (SELECT id FROM job_runs WHERE state = 'queued' ORDER BY id LIMIT 1)
RETURNING id, job_id;

-- name: finish_run!
UPDATE job_runs
SET state = 'done', output = :output, finished_at = CURRENT_TIMESTAMP
WHERE id = :id AND state = 'running' AND worker = :worker;

-- name: count_runs$
SELECT count(*) FROM job_runs;

-- name: count_queued_runs$
SELECT count(*) FROM job_runs WHERE state = 'queued';

-- name: count_runs_by_state
SELECT state, count(*) AS runs FROM job_runs GROUP BY state;

-- name: count_outputs$
SELECT count(*) FROM job_runs WHERE output IS NOT NULL;

-- name: count_runs_by_worker
-- Workers are named start/number; start tells this start of the service from earlier ones.
SELECT worker, count(*) AS runs FROM job_runs
WHERE state = 'done' AND worker LIKE :start || '/%'
GROUP BY worker ORDER BY worker;
