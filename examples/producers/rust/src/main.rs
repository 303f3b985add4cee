//! Spans and a reward of one attempt, published with rdkafka (librdkafka). Nothing of Fulgurite is imported.
//!
//!     cargo run --quiet -- ROLLOUT_ID ATTEMPT_ID
//!
//! Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
//! __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
//! brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.

use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext, Message};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, error::Error};

/// Counts what the brokers acknowledged.
struct Deliveries(AtomicUsize);
impl ClientContext for Deliveries {}
impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();
    fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
        match result {
            Ok(_) => _ = self.0.fetch_add(1, Ordering::SeqCst),
            Err((error, record)) => eprintln!("not delivered to {}: {error}", record.topic()),
        }
    }
}

/// The gateway makes trace ids the same way, so its LLM calls and these spans are one trace.
fn hex_id(text: &str, digits: usize) -> String {
    Sha256::digest(text).iter().take(digits / 2).map(|byte| format!("{byte:02x}")).collect()
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_nanos() as u64
}
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [rollout, attempt] = arguments.as_slice() else { return Err("usage: producer ROLLOUT_ID ATTEMPT_ID".into()) };
    let (path, start_ns, service) = (format!("{rollout}/{attempt}"), now_ns(), "producer-rust");
    let span = |name: &str, fields: Value| {
        let mut span = json!({"rollout_id": rollout, "attempt_id": attempt, "name": name, "service": service,
            "trace_id": hex_id(&path, 32), "span_id": hex_id(&format!("{path}/{name}"), 16),
            "start_ns": start_ns, "end_ns": now_ns()});
        span.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        span.to_string()
    };
    let (root, output) = (hex_id(&format!("{path}/answer"), 16), "\"glass\" – made by\nlightning");
    let search = json!({"operation": "execute_tool", "parent_span_id": root, "input": r#"{"q": "fulgurite"}"#,
        "output": output, "attributes": {"hits": 3}});
    let calculate = json!({"operation": "execute_tool", "parent_span_id": root, "input": "6*7", "output": "42"});
    let reward = json!({"reward_id": format!("{attempt}-reward"), "rollout_id": rollout, "attempt_id": attempt,
        "value": 0.75, "dimensions": {"exact": 1.0, "brief": 0.5}, "source": service});

    let setting = |name: &str, default: &str| env::var(format!("FULGURITE_KAFKA__{name}")).unwrap_or(default.into());
    let topic = |name: &str| setting("TOPIC_PREFIX", "fulgurite.") + name;
    let producer: ThreadedProducer<Deliveries> = ClientConfig::new()
        .set("bootstrap.servers", setting("BOOTSTRAP_SERVERS", "127.0.0.1:9092"))
        .set("security.protocol", setting("SECURITY_PROTOCOL", "PLAINTEXT")) // for TLS: features = ["ssl"]
        .set("sasl.mechanisms", "PLAIN")
        .set("sasl.username", setting("SASL_USERNAME", ""))
        .set("sasl.password", setting("SASL_PASSWORD", ""))
        .set("partitioner", "murmur2_random") // as Kafka's own clients; librdkafka's default is CRC32
        .set("enable.idempotence", "true") // implies acks=all
        .set("delivery.timeout.ms", "30000")
        .create_with_context(Deliveries(AtomicUsize::new(0)))?;
    let records = [
        (topic("spans"), span("search", search) + "\n" + &span("calculate", calculate)), // several spans: a line each
        (topic("spans"), span("answer", json!({"operation": "invoke_agent", "status": "ok"}))),
        (topic("rewards"), reward.to_string()),
    ];
    for (topic, value) in &records {
        producer.send(BaseRecord::to(topic).key(rollout).payload(value)).map_err(|(error, _)| error)?;
    }
    producer.flush(Duration::from_secs(40))?;
    let delivered = producer.context().0.load(Ordering::SeqCst);
    if delivered == records.len() { Ok(()) } else { Err(format!("{delivered} of 3 records delivered").into()) }
}
