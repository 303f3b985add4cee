#!/usr/bin/env bash
# Spans and a reward of one attempt, published with kcat (librdkafka); jq makes the JSON. Debian: apt install kcat jq
#
#     ./producer.sh ROLLOUT_ID ATTEMPT_ID
#
# Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
# __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
# brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
set -euo pipefail

rollout=${1:?usage: producer.sh ROLLOUT_ID ATTEMPT_ID}
attempt=${2:?usage: producer.sh ROLLOUT_ID ATTEMPT_ID}
prefix=${FULGURITE_KAFKA__TOPIC_PREFIX:-fulgurite.}
start_ns=$(date +%s%N)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# A file, because arguments can be seen by everybody on this machine. librdkafka's default partitioner is CRC32, which puts
# a rollout into another partition than every Java client: murmur2_random is Kafka's.
cat >"$folder/kcat.conf" <<END
bootstrap.servers=${FULGURITE_KAFKA__BOOTSTRAP_SERVERS:-127.0.0.1:9092}
security.protocol=${FULGURITE_KAFKA__SECURITY_PROTOCOL:-PLAINTEXT}
sasl.mechanisms=PLAIN
sasl.username=${FULGURITE_KAFKA__SASL_USERNAME:-}
sasl.password=${FULGURITE_KAFKA__SASL_PASSWORD:-}
partitioner=murmur2_random
enable.idempotence=true
acks=all
delivery.timeout.ms=30000
END

# hex_id TEXT DIGITS: the gateway makes trace ids the same way, so its LLM calls and these spans are one trace.
hex_id() { printf %s "$1" | sha256sum | cut -c "1-$2"; }

# span NAME OPERATION FIELDS: one line of JSON.
span() {
  jq -cn --arg rollout_id "$rollout" --arg attempt_id "$attempt" --arg name "$1" --arg operation "$2" \
    --arg trace_id "$(hex_id "$rollout/$attempt" 32)" --arg span_id "$(hex_id "$rollout/$attempt/$1" 16)" \
    --argjson start_ns "$start_ns" --argjson end_ns "$(date +%s%N)" --arg service producer-shell \
    --argjson fields "$3" '$ARGS.named + $fields | del(.fields)'
}

# publish TOPIC FILE: the file is the value of one record. kcat waits for the acknowledgement and ends with 1 where none
# came, which ends this script.
publish() { kcat -F "$folder/kcat.conf" -q -P -t "$prefix$1" -k "$rollout" "$2"; }

root=$(hex_id "$rollout/$attempt/answer" 16)
search=$(jq -cn --arg parent_span_id "$root" --arg input '{"q": "fulgurite"}' \
  --arg output $'"glass" – made by\nlightning' '$ARGS.named + {attributes: {hits: 3}}')
calculate=$(jq -cn --arg parent_span_id "$root" --arg input '6*7' --arg output 42 '$ARGS.named')
{
  span search execute_tool "$search"
  span calculate execute_tool "$calculate"
} >"$folder/tools" # several spans in a record: a line each
span answer invoke_agent '{"status": "ok"}' >"$folder/answer"
jq -cn --arg rollout_id "$rollout" --arg attempt_id "$attempt" '$ARGS.named + {reward_id: "\($attempt_id)-reward",
  value: 0.75, dimensions: {exact: 1.0, brief: 0.5}, source: "producer-shell"}' >"$folder/reward"

publish spans "$folder/tools"
publish spans "$folder/answer"
publish rewards "$folder/reward"
echo "delivered 3 records"
