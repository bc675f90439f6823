# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# flood: many more flows than ct_map takes, while conversations go on.

flood_way
asked=(10.43.0.14:80=abcd "fd43::14:80=abcd" 10.43.0.11:80=a "fd43::15:80=c" 10.43.0.23:80=abc "fd43::28:80=abcd")

# flood NAME flood|syns N RATE: so many questions, while conversations go on. Sets what came of it.
talking="client4 client6 laptop4 laptop6"
flood() {
	local name before after status=0
	for name in $talking; do flows_start "$name" "${name%?}" 20 "$(vip_port "${name: -1}" 14 80)"; done
	# shellcheck disable=SC2086 # words
	check "$1: 80 conversations" round $talking
	before=$(lifter node1 --status -o json)
	for name in $talking; do flows_say "$name" run 600 "$world_dir/enough"; done
	"$WIRE" "$2" "$(world_ns node1)" "${@:3}" 300 "${asked[@]}" >"$world_dir/flood" 2>&1 || status=$?
	touch "$world_dir/enough"
	for name in $talking; do flows_hear "$name" || true; done >"$world_dir/conversations"
	after=$(lifter node1 --status -o json)
	[ ${#streams[@]} = 0 ] || wait "${streams[@]}" || true
	check "$1: each answer came from who was asked, to who asked" went
	# shellcheck disable=SC2086 # words
	check "$1: afterwards each conversation goes on" round $talking
	rm "$world_dir/enough"
	for name in $talking; do flows_end "$name"; done
	read -r _ sent _ answered _ _ _ bare _ took <<<"$(tail -n 1 "$world_dir/flood")"
	check "$1: all were sent" same "$sent" "$3"
	again=$(($(gained flow_new) - sent)) healed=$(gained flow_healed)
	broken=$(total broken) nudged=$(total nudged)
	echo "router $1: $sent flows through $(jq .flows.capacity <<<"$after") entries in $took s, $bare of $answered answers met no flow;" \
		"of 80 conversations, half TCP, $broken broke, $nudged waited for the client's next word;" \
		"their flows were begun again $again times, with the same pod, where a table that draws anew would have moved" \
		"$((again * 3 / 4)); halves were restored $healed times"
}
went() { cat "$world_dir/flood" && [ $status = 0 ] && [[ $(tail -n 1 "$world_dir/flood") == *" wrong 0 "* ]]; }
gained() { jq -n --argjson a "$after" --argjson b "$before" "\$a.counters.$1 - \$b.counters.$1"; }
total() { sed "s/.* \([0-9]*\) $1.*/\1/" "$world_dir/conversations" | paste -sd + | bc; }
# None broke; and hardly one was forgotten while an answer was under way, which a machine with
# much else to do may delay for longer than a flow lives in a full table.
nobody_lost() { cat "$world_dir/conversations"; [ "$broken" = 0 ] && [ "$nudged" -le 4 ]; }

agent_stop node1 TERM
agent_start node1 --flows 1024

# More than twenty times the 512 flows that it takes, slowly enough that an answer meets its flow.
world_run pod-a ./talk.py sink 9100 >"$world_dir/sink"
sink=$world_pid
soon 5 grep -q ready "$world_dir/sink"
streams=()
for way in $ways; do
	on "${way%:*}" timeout 120 ./talk.py stream "$(vip "${way#*:}" 17)" 80 "$world_dir/enough" >"$world_dir/stream-$way" &
	streams+=($!)
done
watch
flood "a small table" flood 12000 2500
watched "a small table" unsure strays
check "a small table: no conversation was cut off" nobody_lost
kill $sink
streams=()
for way in $ways; do
	check "a small table, $(link "${way%:*}"), IPv${way#*:}: who was answered only at the end" same "$(cat "$world_dir/stream-$way")" "heard all the while"
done
check "a small table: halves were restored" test "$healed" -gt 0

# What we refuse: so many in a second are told, all are counted.
for kind in flood syns; do
	name=$([ $kind = flood ] && echo "refusals, UDP" || echo "refusals, TCP")
	before=$(lifter node1 --status -o json) status=0
	"$WIRE" $kind "$(world_ns node1)" 6000 1000000 300 10.43.0.14:81=! "fd43::14:81=!" 10.43.0.33:80=! "fd43::33:80=!" >"$world_dir/flood" 2>&1 || status=$?
	after=$(lifter node1 --status -o json)
	read -r _ sent _ answered _ _ _ _ _ took <<<"$(tail -n 1 "$world_dir/flood")"
	echo "router $name: $(tail -n 1 "$world_dir/flood")"
	check "$name: each was told right" went
	check "$name: all were sent" same "$sent" 6000
	check "$name: all were counted" same "$(gained no_port) $(gained no_backend)" "3000 3000"
	check "$name: some were told, not more than 1000 in a second by each CPU" \
		test "$answered" -ge 1000 -a "$answered" -le $(((${took%.*} + 1) * 1000 * $(nproc)))
	check "$name: the others were counted" same "$(gained unanswered)" $((sent - answered))
done

# A table in which a flow lives for less than a round trip: what plain LRU can do is little.
watch
flood "a table too small" flood 100000 1000000
watched "a table too small" unsure strays lost # it may be more than can be looked at; what was is right

agent_stop node1 TERM
agent_start node1
watch 50
flood "a usual table" flood 1000000 1000000
watched "a usual table" unsure strays
check "a usual table: no conversation was cut off" nobody_lost
check "a usual table: not one answer in a thousand met no flow" test $((bare * 1000)) -le "$answered"
# Nobody listens to a second SYN-ACK; thousands of them at once are in the others' way.
for pod in a b c d; do on pod-$pod sysctl -qw net.ipv4.tcp_synack_retries=0; done
watch
flood "a flood of SYNs" syns 100000 1000000
watched "a flood of SYNs" unsure strays lost
check "a flood of SYNs: no conversation was cut off" nobody_lost
check "a flood of SYNs: not one answer in a thousand met no flow" test $((bare * 1000)) -le "$answered"
check "a flood of SYNs: hardly one was not answered" test $((answered * 100)) -ge $((sent * 99))
