#!/usr/bin/env bash
# Spans and a reward of one attempt, published with kcat (librdkafka; Debian: apt install kcat) or, where it is missing,
# with Apache Kafka's kafka-console-producer.sh (on the PATH or in $KAFKA_HOME/bin; needs Java).
#
#     ./producer.sh ROLLOUT_ID ATTEMPT_ID
#
# Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
# __SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
# brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
set -euo pipefail

rollout=${1:?usage: producer.sh ROLLOUT_ID ATTEMPT_ID}
attempt=${2:?usage: producer.sh ROLLOUT_ID ATTEMPT_ID}
servers=${FULGURITE_KAFKA__BOOTSTRAP_SERVERS:-127.0.0.1:9092}
user=${FULGURITE_KAFKA__SASL_USERNAME:-} password=${FULGURITE_KAFKA__SASL_PASSWORD:-}
console=$(PATH=$PATH:${KAFKA_HOME:-}/bin type -P kafka-console-producer.sh || true)
type -P kcat >/dev/null || : "${console:?neither kcat nor kafka-console-producer.sh is on the PATH}"
start_ns=$(date +%s%N)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# quoted TEXT: as a JSON string (and as one of JAAS). Control characters but these three are not for texts: refused.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\r'/\\r} text=${text//$'\t'/\\t}
  [[ $text != *[[:cntrl:]]* ]] || { echo "a control character in: $text" >&2; return 1; }
  printf '"%s"' "$text"
}

# Files, because arguments can be seen by everybody on this machine. Kafka's client has murmur2 as its default; that of
# librdkafka, CRC32, would put a rollout into another partition than every Java client: murmur2_random is Kafka's.
printf '%s\n' acks=all enable.idempotence=true delivery.timeout.ms=30000 \
  "security.protocol=${FULGURITE_KAFKA__SECURITY_PROTOCOL:-PLAINTEXT}" >"$folder/kcat.conf"
cp "$folder/kcat.conf" "$folder/java.conf"
printf '%s\n' "bootstrap.servers=$servers" sasl.mechanisms=PLAIN "sasl.username=$user" "sasl.password=$password" \
  partitioner=murmur2_random >>"$folder/kcat.conf"
login="username=$(quoted "$user") password=$(quoted "$password");"
printf '%s\n' sasl.mechanism=PLAIN "sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
${login//\\/\\\\}" >>"$folder/java.conf"

# publish TOPIC FILE: by kcat, the file as one record, a span a line; by Kafka's tool, which takes every line for a record,
# a record a line. Both wait for the acknowledgement (--sync) and end with 1 without it, which ends this script.
publish() {
  local topic=${FULGURITE_KAFKA__TOPIC_PREFIX:-fulgurite.}$1
  if type -P kcat >/dev/null; then
    kcat -F "$folder/kcat.conf" -q -P -t "$topic" -k "$rollout" "$2"
  else
    while IFS= read -r line; do printf '%s\t%s\n' "$rollout" "$line"; done <"$2" |
      "$console" --bootstrap-server "$servers" --sync \
        --topic "$topic" --producer.config "$folder/java.conf" --property parse.key=true >"$folder/console" ||
      { cat "$folder/console" >&2; return 1; }
  fi
}

# hex_id TEXT DIGITS: the gateway makes trace ids the same way, so its LLM calls and these spans are one trace.
hex_id() { printf %s "$1" | sha256sum | cut -c "1-$2"; }
ids="\"rollout_id\":$(quoted "$rollout"),\"attempt_id\":$(quoted "$attempt")"

# span NAME OPERATION FIELDS: one line of JSON.
span() {
  printf '{%s,"trace_id":"%s","span_id":"%s","name":%s,"operation":%s,"start_ns":%s,"end_ns":%s,"service":%s,%s}\n' \
    "$ids" "$(hex_id "$rollout/$attempt" 32)" "$(hex_id "$rollout/$attempt/$1" 16)" "$(quoted "$1")" "$(quoted "$2")" \
    "$start_ns" "$(date +%s%N)" '"producer-shell"' "$3"
}
parent="\"parent_span_id\":\"$(hex_id "$rollout/$attempt/answer" 16)\""
{
  span search execute_tool "$parent,\"input\":$(quoted '{"q": "fulgurite"}'),\"output\":$(
    quoted $'"glass" – made by\nlightning'),\"attributes\":{\"hits\":3}"
  span calculate execute_tool "$parent,\"input\":\"6*7\",\"output\":\"42\""
} >"$folder/tools"
span answer invoke_agent '"status":"ok"' >"$folder/answer"
printf '{%s,"reward_id":%s,"value":0.75,"dimensions":{"exact":1.0,"brief":0.5},"source":"producer-shell"}\n' \
  "$ids" "$(quoted "$attempt-reward")" >"$folder/reward"
for record in "spans tools" "spans answer" "rewards reward"; do publish "${record% *}" "$folder/${record#* }"; done
echo "delivered"
