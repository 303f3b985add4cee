-- Users for Fulgurite on a ClickHouse server of yours. Run once as an administrator, with passwords of your own:
--     clickhouse-client --multiquery < users.sql
-- The database is the setting clickhouse.database; replace `fulgurite.*` where yours has another name. A test runs
-- migrations, inserts, redaction and the views with exactly these grants.

CREATE USER IF NOT EXISTS fulgurite IDENTIFIED WITH sha256_password BY 'change-me';
CREATE USER IF NOT EXISTS fulgurite_reader IDENTIFIED WITH sha256_password BY 'change-me-too' SETTINGS readonly = 2;

-- `fulgurite migrate` and the materialiser: everything within their one database, nothing outside it. No files, no URLs,
-- no users, no server settings.
GRANT CREATE DATABASE, SHOW, SELECT, INSERT, ALTER, CREATE TABLE, CREATE VIEW, DROP TABLE, DROP VIEW, TRUNCATE, OPTIMIZE ON fulgurite.* TO fulgurite;
GRANT SELECT ON system.* TO fulgurite;
GRANT TABLE ENGINE ON Atomic, TABLE ENGINE ON Null, TABLE ENGINE ON MergeTree, TABLE ENGINE ON ReplacingMergeTree, TABLE ENGINE ON AggregatingMergeTree TO fulgurite;

-- Dashboards and people: `fulgurite sql`, Grafana. They read, and may change settings of their own queries.
GRANT SHOW, SELECT ON fulgurite.* TO fulgurite_reader;
