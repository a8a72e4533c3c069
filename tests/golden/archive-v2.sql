SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
CREATE SCHEMA fleetlm;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE fleetlm.archive (
    sole boolean DEFAULT true NOT NULL,
    ring_uid text NOT NULL,
    version integer NOT NULL,
    pruned_before_us bigint DEFAULT 0 NOT NULL,
    CONSTRAINT archive_sole_check CHECK (sole)
);
CREATE TABLE fleetlm.changes (
    xid xid8 DEFAULT pg_current_xact_id() NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    sessions bytea[] NOT NULL
);
CREATE TABLE fleetlm.halted (
    volume_id text NOT NULL,
    slot integer NOT NULL,
    from_pos bigint NOT NULL,
    session bytea NOT NULL,
    seq bigint NOT NULL,
    halted_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE fleetlm.messages (
    session bytea NOT NULL,
    seq bigint NOT NULL,
    inserted_at_us bigint NOT NULL,
    sender bytea NOT NULL,
    key bytea NOT NULL,
    content_hash bytea NOT NULL,
    body bytea NOT NULL
)
PARTITION BY RANGE (inserted_at_us);
CREATE TABLE fleetlm.messages_2968 (
    session bytea CONSTRAINT messages_session_not_null NOT NULL,
    seq bigint CONSTRAINT messages_seq_not_null NOT NULL,
    inserted_at_us bigint CONSTRAINT messages_inserted_at_us_not_null NOT NULL,
    sender bytea CONSTRAINT messages_sender_not_null NOT NULL,
    key bytea CONSTRAINT messages_key_not_null NOT NULL,
    content_hash bytea CONSTRAINT messages_content_hash_not_null NOT NULL,
    body bytea CONSTRAINT messages_body_not_null NOT NULL
);
CREATE TABLE fleetlm.participants (
    participant bytea NOT NULL,
    session bytea NOT NULL,
    sent_seq bigint DEFAULT 0 NOT NULL,
    read_seq bigint DEFAULT 0 NOT NULL
);
CREATE TABLE fleetlm.positions (
    volume_id text NOT NULL,
    shard text NOT NULL,
    term bigint NOT NULL,
    pos bigint NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE fleetlm.quarantine (
    volume_id text NOT NULL,
    pos bigint NOT NULL,
    session bytea NOT NULL,
    seq bigint NOT NULL,
    reason text NOT NULL,
    record bytea NOT NULL,
    body bytea,
    quarantined_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE fleetlm.sessions (
    session bytea NOT NULL,
    slot integer NOT NULL,
    inserted_at_us bigint NOT NULL,
    first_seq bigint DEFAULT 0 NOT NULL,
    last_seq bigint DEFAULT 0 NOT NULL,
    metadata bytea DEFAULT '\x7b7d'::bytea NOT NULL,
    active_at_us bigint DEFAULT 0 NOT NULL
);
ALTER TABLE ONLY fleetlm.messages ATTACH PARTITION fleetlm.messages_2968 FOR VALUES FROM ('1795046400000000') TO ('1795651200000000');
INSERT INTO fleetlm.archive VALUES (true, 'ring-1', 2, 0);
INSERT INTO fleetlm.changes VALUES ('757', '2026-11-26 12:00:26.583113+00', '{"\\x73"}');
INSERT INTO fleetlm.messages_2968 VALUES ('\x73', 1, 1795475336123456, '\x61', '\x6b65792d31', '\xaa705472acee0f6931f644b6b3e43386', '\x7b226964223a2230313930633163322d303030302d373030302d383030302d373164656265623038623032222c2273657373696f6e5f6964223a2273222c22736571223a312c22696e7365727465645f6174223a22323032362d31312d32335432333a30383a35362e3132333435365a222c2273656e6465725f6964223a2261222c2273656e6465725f6b696e64223a2268756d616e222c226b696e64223a2274657874222c22636f6e74656e74223a226f6e65222c226d65746164617461223a7b7d7d');
INSERT INTO fleetlm.messages_2968 VALUES ('\x73', 2, 1795475336123456, '\x61', '\x6b65792d32', '\x0a8131113ac67b12382a5ec37667322f', '\x7b226964223a2230313930633163322d303030302d373030302d383030302d386131343334363837316432222c2273657373696f6e5f6964223a2273222c22736571223a322c22696e7365727465645f6174223a22323032362d31312d32335432333a30383a35362e3132333435365a222c2273656e6465725f6964223a2261222c2273656e6465725f6b696e64223a2268756d616e222c226b696e64223a2274657874222c22636f6e74656e74223a225c753030303020616e64205c756438303020616c6f6e65222c226d65746164617461223a7b7d7d');
INSERT INTO fleetlm.messages_2968 VALUES ('\x74', 1, 1795475336123456, '\x61', '\x6b65792d31', '\x00d4d9737782332442cfa1ae887d4c66', '\x7b226964223a2230313930633163322d303030302d373030302d383030302d373831366464313761613430222c2273657373696f6e5f6964223a2274222c22736571223a312c22696e7365727465645f6174223a22323032362d31312d32335432333a30383a35362e3132333435365a222c2273656e6465725f6964223a2261222c2273656e6465725f6b696e64223a2268756d616e222c226b696e64223a2274657874222c22636f6e74656e74223a22222c226d65746164617461223a7b7d7d');
INSERT INTO fleetlm.participants VALUES ('\x61', '\x73', 2, 0);
INSERT INTO fleetlm.participants VALUES ('\x61', '\x74', 1, 0);
INSERT INTO fleetlm.participants VALUES ('\x726561646572', '\x73', 0, 2);
INSERT INTO fleetlm.positions VALUES ('volume-0', 'shard-0', 7, 500, '2026-11-26 01:09:22.932526+00');
INSERT INTO fleetlm.quarantine VALUES ('volume-0', 600, '\x74', 2, 'DataError: no', '\x0200010000000000020000000000000040d49cadf960060000d4d9737782332442cfa1ae887d4c660105746b65792d327b226964223a2230313930633163322d303030302d373030302d383030302d613333643634353436366666222c2273657373696f6e5f6964223a2274222c22736571223a322c22696e7365727465645f6174223a22323032362d31312d32335432333a30383a35362e3132333435365a222c2273656e6465725f6964223a2261222c2273656e6465725f6b696e64223a2268756d616e222c226b696e64223a2274657874222c22636f6e74656e74223a22222c226d65746164617461223a7b7d7d', '\x7b226964223a2230313930633163322d303030302d373030302d383030302d613333643634353436366666222c2273657373696f6e5f6964223a2274222c22736571223a322c22696e7365727465645f6174223a22323032362d31312d32335432333a30383a35362e3132333435365a222c2273656e6465725f6964223a2261222c2273656e6465725f6b696e64223a2268756d616e222c226b696e64223a2274657874222c22636f6e74656e74223a22222c226d65746164617461223a7b7d7d', '2026-11-26 01:09:22.982277+00');
INSERT INTO fleetlm.sessions VALUES ('\x73', 3, 1795475336123455, 1, 2, '\x7b22746f706963223a2278227d', 1795475336123456);
INSERT INTO fleetlm.sessions VALUES ('\x74', 1, 1795475336123456, 1, 1, '\x7b7d', 1795475336123456);
ALTER TABLE ONLY fleetlm.archive
    ADD CONSTRAINT archive_pkey PRIMARY KEY (sole);
ALTER TABLE ONLY fleetlm.halted
    ADD CONSTRAINT halted_pkey PRIMARY KEY (volume_id, slot);
ALTER TABLE ONLY fleetlm.messages
    ADD CONSTRAINT messages_pkey PRIMARY KEY (session, seq, inserted_at_us);
ALTER TABLE ONLY fleetlm.messages_2968
    ADD CONSTRAINT messages_2968_pkey PRIMARY KEY (session, seq, inserted_at_us);
ALTER TABLE ONLY fleetlm.participants
    ADD CONSTRAINT participants_pkey PRIMARY KEY (participant, session);
ALTER TABLE ONLY fleetlm.positions
    ADD CONSTRAINT positions_pkey PRIMARY KEY (volume_id);
ALTER TABLE ONLY fleetlm.quarantine
    ADD CONSTRAINT quarantine_pkey PRIMARY KEY (volume_id, pos);
ALTER TABLE ONLY fleetlm.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (session);
CREATE INDEX changes_at_idx ON fleetlm.changes USING btree (at);
CREATE INDEX changes_xid_idx ON fleetlm.changes USING btree (xid);
CREATE INDEX participants_session_participant_idx ON fleetlm.participants USING btree (session, participant);
CREATE INDEX quarantine_session_seq_idx ON fleetlm.quarantine USING btree (session, seq);
ALTER INDEX fleetlm.messages_pkey ATTACH PARTITION fleetlm.messages_2968_pkey;
