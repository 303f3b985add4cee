/**
 * Spans and a reward of one attempt, published with KafkaJS. Nothing of Fulgurite is imported.
 *
 *     npm install && npm run build && npm start -- ROLLOUT_ID ATTEMPT_ID
 *
 * Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
 * __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
 * brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
 */
import { createHash } from "node:crypto";
import { Kafka, logLevel, Partitioners } from "kafkajs";

const [rollout_id, attempt_id] = process.argv.slice(2);
if (!rollout_id || !attempt_id) {
  console.error("usage: producer ROLLOUT_ID ATTEMPT_ID");
  process.exit(2);
}
const env = (name: string, otherwise: string) => process.env[`FULGURITE_KAFKA__${name}`] ?? otherwise;
const prefix = env("TOPIC_PREFIX", "fulgurite.");
const protocol = env("SECURITY_PROTOCOL", "PLAINTEXT");
const login = { mechanism: "plain", username: env("SASL_USERNAME", ""), password: env("SASL_PASSWORD", "") } as const;
const attempt = `${rollout_id}/${attempt_id}`;

/** The gateway makes trace ids the same way, so its LLM calls and these spans are one trace. */
function hexId(text: string, digits: number): string {
  return createHash("sha256").update(text).digest("hex").slice(0, digits);
}

/** Above 2^53, but whole milliseconds have 13 significant digits: a double holds and JSON prints them exactly. */
function nowNs(): number {
  return Date.now() * 1_000_000;
}

const start_ns = nowNs();
function span(name: string, operation: string, fields: object): string {
  return JSON.stringify({
    rollout_id, attempt_id, name, operation, start_ns, end_ns: nowNs(), service: "producer-typescript",
    trace_id: hexId(attempt, 32), span_id: hexId(`${attempt}/${name}`, 16), ...fields,
  });
}

const parent_span_id = hexId(`${attempt}/answer`, 16);
const search = span("search", "execute_tool", {
  parent_span_id, input: '{"q": "fulgurite"}', output: '"glass" – made by\nlightning', attributes: { hits: 3 },
});
const calculate = span("calculate", "execute_tool", { parent_span_id, input: "6*7", output: "42" });
const answer = span("answer", "invoke_agent", { status: "ok" });
const reward = JSON.stringify({
  reward_id: `${attempt_id}-reward`, rollout_id, attempt_id, value: 0.75,
  dimensions: { exact: 1.0, brief: 0.5 }, source: "producer-typescript",
});

const kafka = new Kafka({
  brokers: env("BOOTSTRAP_SERVERS", "127.0.0.1:9092").split(","), logLevel: logLevel.ERROR,
  ssl: protocol.endsWith("SSL"), sasl: protocol.startsWith("SASL") ? login : undefined,
});
// DefaultPartitioner is Kafka's murmur2 over the key; KafkaJS 1 had another one, now called LegacyPartitioner.
const producer = kafka.producer({ idempotent: true, createPartitioner: Partitioners.DefaultPartitioner });
try {
  await producer.connect();
  await producer.sendBatch({
    acks: -1, // all
    topicMessages: [
      {
        topic: `${prefix}spans`,
        messages: [
          { key: rollout_id, value: `${search}\n${calculate}` }, // several spans in a record: a line each
          { key: rollout_id, value: answer },
        ],
      },
      { topic: `${prefix}rewards`, messages: [{ key: rollout_id, value: reward }] },
    ],
  });
} catch (error) {
  console.error("not delivered:", error);
  process.exitCode = 1;
} finally {
  await producer.disconnect();
}
