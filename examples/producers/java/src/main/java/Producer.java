import com.fasterxml.jackson.databind.ObjectMapper;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.security.plain.PlainLoginModule;
import org.apache.kafka.common.serialization.StringSerializer;

/**
 * Spans and a reward of one attempt, published with Apache Kafka's client. Nothing of Fulgurite is imported.
 *
 * <pre>mvn -q compile exec:java -Dexec.args="ROLLOUT_ID ATTEMPT_ID"</pre>
 *
 * Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
 * __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
 * brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
 */
public record Producer(String rollout, String attempt, long startNs) {
    static final ObjectMapper JSON = new ObjectMapper();
    static final String SERVICE = "producer-java";

    public static void main(String[] args) throws Exception {
        if (args.length != 2) throw new IllegalArgumentException("usage: ROLLOUT_ID ATTEMPT_ID");
        var prefix = env("TOPIC_PREFIX", "fulgurite.");
        var settings = Map.<String, Object>of(
                "bootstrap.servers", env("BOOTSTRAP_SERVERS", "127.0.0.1:9092"),
                "security.protocol", env("SECURITY_PROTOCOL", "PLAINTEXT"),
                "sasl.mechanism", "PLAIN",
                "sasl.jaas.config", PlainLoginModule.class.getName() + " required username=\"%s\" password=\"%s\";"
                        .formatted(env("SASL_USERNAME", ""), env("SASL_PASSWORD", "")),
                "max.block.ms", 10_000, // without a broker, send waits for this long
                "delivery.timeout.ms", 40_000,
                "acks", "all"); // as by default, like idempotence and murmur2 over the key

        var it = new Producer(args[0], args[1], nowNs());
        var root = it.hexId("/answer", 16);
        var search = it.span("search", "execute_tool", Map.of("parent_span_id", root, "input", "{\"q\": \"fulgurite\"}",
                "output", "\"glass\" – made by\nlightning", "attributes", Map.of("hits", 3)));
        var calculate = it.span("calculate", "execute_tool", Map.of("parent_span_id", root, "input", "6*7", "output", "42"));
        var answer = it.span("answer", "invoke_agent", Map.of("status", "ok"));
        var reward = JSON.writeValueAsString(Map.of("reward_id", it.attempt + "-reward", "rollout_id", it.rollout,
                "attempt_id", it.attempt, "value", 0.75, "dimensions", Map.of("exact", 1.0, "brief", 0.5), "source", SERVICE));
        try (var kafka = new KafkaProducer<>(settings, new StringSerializer(), new StringSerializer())) {
            var sent = List.of(
                    kafka.send(new ProducerRecord<>(prefix + "spans", it.rollout, search + "\n" + calculate)), // a line each
                    kafka.send(new ProducerRecord<>(prefix + "spans", it.rollout, answer)),
                    kafka.send(new ProducerRecord<>(prefix + "rewards", it.rollout, reward)));
            for (var acknowledgement : sent) acknowledgement.get(); // throws where there is none: exit code 1
        }
    }

    String span(String name, String operation, Map<String, Object> fields) throws Exception {
        var value = new HashMap<String, Object>(Map.of("rollout_id", rollout, "attempt_id", attempt, "name", name,
                "operation", operation, "trace_id", hexId("", 32), "span_id", hexId("/" + name, 16),
                "start_ns", startNs, "end_ns", nowNs(), "service", SERVICE));
        value.putAll(fields);
        return JSON.writeValueAsString(value);
    }

    static String env(String name, String otherwise) {
        return System.getenv().getOrDefault("FULGURITE_KAFKA__" + name, otherwise);
    }

    /** Trace ids as the gateway makes them, so its LLM calls and these spans are one trace. */
    String hexId(String path, int digits) throws Exception {
        var text = (rollout + "/" + attempt + path).getBytes(StandardCharsets.UTF_8);
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(text)).substring(0, digits);
    }

    static long nowNs() {
        return ChronoUnit.NANOS.between(Instant.EPOCH, Instant.now());
    }
}
