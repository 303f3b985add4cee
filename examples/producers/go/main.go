// Spans and a reward of one attempt, published with franz-go. Nothing of Fulgurite is imported.
//
//	go run . ROLLOUT_ID ATTEMPT_ID
//
// Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
// __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
// brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/plain"
)

type object = map[string]any

// hexID makes trace ids as the gateway does, so its LLM calls and these spans are one trace.
func hexID(text string, digits int) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:digits]
}

func line(value object) []byte {
	data, _ := json.Marshal(value) // cannot fail: texts, numbers and objects of them
	return append(data, '\n')
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: producer ROLLOUT_ID ATTEMPT_ID")
	}
	rollout, attempt, path, start := os.Args[1], os.Args[2], os.Args[1]+"/"+os.Args[2], time.Now().UnixNano()
	span := func(name, operation string, fields object) []byte {
		value := object{"rollout_id": rollout, "attempt_id": attempt, "name": name, "operation": operation,
			"trace_id": hexID(path, 32), "span_id": hexID(path+"/"+name, 16),
			"start_ns": start, "end_ns": time.Now().UnixNano(), "service": "producer-go"}
		maps.Copy(value, fields)
		return line(value)
	}
	root := hexID(path+"/answer", 16)
	search := span("search", "execute_tool", object{"parent_span_id": root, "input": `{"q": "fulgurite"}`,
		"output": "\"glass\" – made by\nlightning", "attributes": object{"hits": 3}})
	calculate := span("calculate", "execute_tool", object{"parent_span_id": root, "input": "6*7", "output": "42"})
	reward := line(object{"reward_id": attempt + "-reward", "rollout_id": rollout, "attempt_id": attempt, "value": 0.75,
		"dimensions": object{"exact": 1.0, "brief": 0.5}, "source": "producer-go"})

	// Idempotence, acks=all and Kafka's murmur2 over the key are franz-go's defaults.
	env := func(name string) string { return os.Getenv("FULGURITE_KAFKA__" + name) }
	servers := cmp.Or(env("BOOTSTRAP_SERVERS"), "127.0.0.1:9092")
	options := []kgo.Opt{kgo.SeedBrokers(strings.Split(servers, ",")...), kgo.RecordDeliveryTimeout(30 * time.Second)}
	if strings.HasPrefix(env("SECURITY_PROTOCOL"), "SASL") {
		options = append(options, kgo.SASL(plain.Auth{User: env("SASL_USERNAME"), Pass: env("SASL_PASSWORD")}.AsMechanism()))
	}
	if strings.HasSuffix(env("SECURITY_PROTOCOL"), "SSL") {
		options = append(options, kgo.DialTLS())
	}
	client, err := kgo.NewClient(options...)
	if err != nil {
		log.Fatal(err)
	}
	prefix, key := cmp.Or(env("TOPIC_PREFIX"), "fulgurite."), []byte(rollout)
	results := client.ProduceSync(context.Background(),
		&kgo.Record{Topic: prefix + "spans", Key: key, Value: append(search, calculate...)}, // several spans: a line each
		&kgo.Record{Topic: prefix + "spans", Key: key, Value: span("answer", "invoke_agent", object{"status": "ok"})},
		&kgo.Record{Topic: prefix + "rewards", Key: key, Value: reward})
	if err := results.FirstErr(); err != nil {
		log.Fatalf("not delivered: %v", err)
	}
}
