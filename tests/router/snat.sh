# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# snat: node2 has its own VPN and answers the clients by it. Without source NAT what pods of
# node2 answer goes the wrong way; with it, it comes back by node1, and conntrack in between
# sees the client.

# Everybody's own way to the clients; and node2 does not mind what comes by node1.
for n in 1 2; do
	route "node$n" 100.64.0.0/24 fd7a::/64 dev tailscale0
	route "node$n" 100.99.0.0/24 fd99::/64 dev vpn0
done
loose() { # 0|1: loose or strict about the way by which packets come
	on node2 sysctl -qw net.ipv4.conf.all.rp_filter="$1" net.ipv4.conf.lan.rp_filter="$1"
	on node2 nft flush chain ip6 strict prerouting
}
loose 0

watch
for way in $ways; do
	host=${way%:*} family=${way#*:}
	check "$(link "$host"), IPv$family: without source NAT nothing comes of it" same \
		"$(PATIENCE=0.3 talk "$host" ask udp "$(vip "$family" 15)" 80)" "timed out"
done
kill "$watcher"
wait "$watcher" || true
check "without source NAT: answers come the wrong way, bare" grep -E '^packets .* strays [1-9]' "$world_dir/wire"

# asks HOST KIND FAMILY NUMBER: "POD ADDRESS", and "ours" for a port of ours
asks() {
	local pod address port
	read -r pod address port <<<"$(talk "$1" ask "$2" "$(vip "$3" "$4")" 80)"
	[[ $port == [0-9]* ]] || port=0
	echo "$pod $address$( ((port >= 61000)) && echo " ours")"
}
in_fragments() {
	same "$(PATIENCE=0.5 talk "$1" ask udp "$(vip "$2" 15)" 80 3300 | cut -d ' ' -f 1-2)" "pod-c $(node_at "$2" c)"
}
trace() { # what could be left behind
	on node1 tc qdisc show | sort
	find "$(pins node1)" 2>/dev/null || true
}

# snat_start auto|on [OPTION...]: the agent, at work towards pods too; $linked: see below
linked=
snat_start() {
	agent_start node1 --snat "$@"
	check "--snat $1: there are doors towards pods" soon 5 doors_are "$([ "$1" = on ] && echo "${linked}cni0 ")lan to-hop"
}
doors_are() {
	same "$(lifter node1 --status -o json | jq -r '[.interfaces[].name | select(. != "tailscale0" and . != "vpn0" and . != "flood0")] | sort | join(" ")')" "$1"
}

lifter node1 --cleanup
before=$(trace)
for setting in auto on; do
	snat_start $setting
	watch
	for way in $ways; do
		host=${way%:*} family=${way#*:} me=$(own "${way%:*}" "${way#*:}")
		name="--snat $setting, $(link "$host"), IPv$family"
		for kind in tcp udp; do
			for row in "a 11" "c 15" "h 12"; do
				pod=${row% *} seen="$(node_at "$family" "${row% *}") ours"
				[ $setting$pod != autoa ] || seen=$me
				check "$name, $kind: pod-$pod" same "$(asks "$host" $kind "$family" "${row#* }")" "pod-$pod $seen"
			done
		done
		bridge_looks node2 0
		check "$name: a datagram in fragments" soon 5 in_fragments "$host" "$family"
		bridge_looks node2 1
	done
	watched "snat $setting" unsure
	lifter node1 --cleanup
	check "--snat $setting: --cleanup leaves nothing" same "$(trace)" "$before"
done

### errors along such a flow

snat_start auto
offload off
watch
on pod-c ethtool -K eth0 tx off >/dev/null
for way in $ways; do
	host=${way%:*} family=${way#*:} name="--snat auto, $(link "${way%:*}"), IPv${way#*:}"
	to=$(vip "$family" 12)
	check "$name: TTL exceeded at a router" same "$(talk "$host" ttl 2 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	to=$(vip "$family" 20)
	check "$name: nobody listens in the pod" same "$(talk "$host" refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
	world_run pod-c ./talk.py late 9100 >"$world_dir/late"
	late=$world_pid
	soon 5 grep -q ready "$world_dir/late"
	check "$name: a client that leaves" talk "$host" leave "$(vip "$family" 21)" 80
	wait $late || true
	check "$name: its port unreachable reaches the pod" same "$(tail -n 1 "$world_dir/late")" \
		"ECONNREFUSED from $(node_at "$family" c) about $(node_at "$family" c):PORT, its own words"
done
watched "snat errors"
offload on
route hop 10.42.9.5 fd42:0:0:9::5 dev cni0 mtu 1300
for way in $ways; do
	host=${way%:*} family=${way#*:} to=$(vip "${way#*:}" 12)
	check "--snat auto, $(link "$host"), IPv$family: UDP learns the MTU" same "$(talk "$host" mtu udp "$to" 80)" \
		"EMSGSIZE from $to about $to:80, its own words, mtu 1300 1300, as long is answered"
	forget_paths
	check "--snat auto, $(link "$host"), IPv$family: TCP learns the MTU" same "$(talk "$host" mtu tcp "$to" 80 | sed 's/mtu .* then/mtu/')" "pod-h mtu 1300"
	forget_paths
done
ip -n "$(world_ns hop)" route delete 10.42.9.5
ip -n "$(world_ns hop)" -6 route delete fd42:0:0:9::5

### a link for each pod, as Calico has it: no bridge, a route to each

for pod in p q; do
	n=$([ $pod = p ] && echo 5 || echo 6)
	linked+="cali-$pod "
	world_host pod-$pod
	router_host pod-$pod
	joined node1 cali-$pod pod-$pod eth0
	address pod-$pod eth0 10.42.5.$n/32 fd42:0:0:5::$n/128
	route pod-$pod 169.254.1.1 fd42:0:0:5::1 dev eth0
	route pod-$pod default default via 169.254.1.1 fd42:0:0:5::1 dev eth0
	mac=$(on node1 ip -j link show cali-$pod | jq -r ".[0].address") # Calico's node answers who asks for it
	for gateway in 169.254.1.1 fd42:0:0:5::1; do ip -n "$(world_ns pod-$pod)" neighbour add $gateway lladdr "$mac" dev eth0; done
	route node1 10.42.5.$n fd42:0:0:5::$n dev cali-$pod
	world_start pod-$pod "$WORLD" pod pod-$pod 8080
	pod_at[$pod]="10.42.5.$n fd42:0:0:5::$n node1"
done
route_source() { on node1 ip -j route get "$(pod_address "$1" "$2")" | jq -r '.[0].prefsrc'; }
links_of_pods() { # SETTING: to each, and from the address of its route
	local way host family kind pod seen
	for way in $ways; do
		host=${way%:*} family=${way#*:}
		for pod in p q; do
			seen="$(route_source $pod "$family") ours"
			[ "$1" = on ] || seen=$(own "$host" "$family")
			for kind in tcp udp; do
				check "--snat $1, $(link "$host"), IPv$family, $kind: pod-$pod by its own link" same \
					"$(asks "$host" $kind "$family" "$([ $pod = p ] && echo 37 || echo 38)")" "pod-$pod $seen"
			done
		done
	done
}
usual=$objects objects=$world_dir/linked.json
{
	cat "$usual"
	service linked-p 37 80 8080=p
	service linked-q 38 80 8080=q
} >"$objects"
agent_stop node1 TERM
lifter node1 --cleanup
before=$(trace)
watch
snat_start auto
links_of_pods auto
lifter node1 --cleanup # or what has begun without goes on without
snat_start on
links_of_pods on
watched "snat, links of pods" unsure
ip -n "$(world_ns node1)" link set cali-p down # and its routes go
check "--snat on: a pod's route goes, and the door" soon 5 doors_are "cali-q cni0 lan to-hop"
ip -n "$(world_ns node1)" link set cali-p up
route node1 10.42.5.5 fd42:0:0:5::5 dev cali-p
check "--snat on: they come back" soon 5 doors_are "${linked}cni0 lan to-hop"
links_of_pods on

# More than there are doors for.
for n in {1..200}; do pod_at[x$n]="10.42.6.$n fd42:0:0:6::$n node1"; done
{
	for n in {1..199..2}; do echo "link add x$n group 7 type veth peer name x$((n + 1))"; done
	for n in {1..200}; do printf '%s\n' "link set x$n up" "route add 10.42.6.$n dev x$n"; done
} | on node1 ip -b -
service many 39 80 8080="$(printf 'x%d ' {1..200})" >>"$objects"
many() {
	same "$(lifter node1 --status -o json | jq '[.interfaces[].name | select(. != "tailscale0" and . != "vpn0")] | length')" 192
	grep -F "more than 192 interfaces towards pods: source NAT is missing towards some" "$world_dir/agent.log"
}
kill -HUP "${agent[node1]}"
check "--snat on: more links than doors, as many as there are, and that is said" soon 20 many
check "--snat on: more links than doors, who is there answers" same \
	"$(for n in 11 15 37 38; do asks client tcp 4 $n | cut -d ' ' -f 1; done | xargs)" "pod-a pod-c pod-p pod-q"
agent_stop node1 TERM
ip -n "$(world_ns node1)" link delete group 7
lifter node1 --cleanup
check "--snat on: links of pods, --cleanup leaves nothing" same "$(trace)" "$before"
objects=$usual linked=
snat_start auto

### nothing is remembered

for way in $ways; do flows_start "${way/:/}" "${way%:*}" 2 "$(vip_port "${way#*:}" 15 80)"; done
talking=${ways//:/}
# shellcheck disable=SC2086 # words
{
	check "--snat auto: 8 conversations" round $talking
	agent_stop node1 KILL
	snat_start auto
	check "--snat auto: another agent, they go on" round $talking
	"$WIRE" forget "$(pins node1)/ct_map" >/dev/null
	check "--snat auto: lost maps, they go on" round $talking
}

### beside who masquerades already

beside() { # SETTING
	local way host family name row
	for way in $ways; do
		host=${way%:*} family=${way#*:} name="--snat on beside $1, $(link "${way%:*}"), IPv${way#*:}"
		for row in "a 11" "c 15" "h 12"; do
			check "$name: pod-${row% *}" same "$(talk "$host" ask tcp "$(vip "$family" "${row#* }")" 80 | cut -d ' ' -f 1-2)" \
				"pod-${row% *} $(node_at "$family" "${row% *}")"
		done
	done
}
agent_stop node1 TERM
snat_start on
watch
flannel_rules node1 iptables 10.42.0.0/16 10.42.0.0/24 224.0.0.0/4
flannel_rules node1 ip6tables fd42::/32 fd42::/64 ff00::/8
out=$(counter node1 snat_out)
beside flannel
check "--snat on beside flannel: ours were those to pods of this node, which it leaves alone" test "$(($(counter node1 snat_out) - out))" -gt 0
for tool in iptables ip6tables; do
	on node1 $tool -t nat -I POSTROUTING ! -o tailscale0 -j MASQUERADE
done
out=$(counter node1 snat_out)
beside "one who masquerades all"
check "--snat on beside one who masquerades all: none were ours" same "$(($(counter node1 snat_out) - out))" 0
watched "snat beside others" unsure
no_rules

### no port is left

flood_way
agent_stop node1 TERM
snat_start auto --flows 262144 # so that it is ports that run out
# The node's own, with the same pod.
flows_start own node1 4 10.42.1.5:8080 "[fd42:0:0:1::5]:8080"
# shellcheck disable=SC2086 # words
check "ports: 8 conversations, and 8 of this node's own" round $talking own
on pod-c sysctl -qw net.ipv4.tcp_synack_retries=0 # nobody listens to a second one
told() { cat "$world_dir/flood"; [ $status = 0 ]; }
for kind in flood syns; do
	name=$([ $kind = flood ] && echo "ports, UDP" || echo "ports, TCP")
	ports=$(counter node1 snat_ports) status=0
	"$WIRE" $kind "$(world_ns node1)" 12000 1000000 60 10.43.0.15:80=c@192.0.2.1 "fd43::15:80=c@2001:db8::1" >"$world_dir/flood" 2>&1 || status=$?
	refused=$(($(counter node1 snat_ports) - ports))
	read -r _ sent _ answered _ <<<"$(tail -n 1 "$world_dir/flood")"
	echo "router $name: $(tail -n 1 "$world_dir/flood"), refused $refused"
	check "$name: none that is in use is used again" told
	check "$name: all were sent" same "$sent" 12000
	check "$name: most of 2 x 4536 were of use" test "$answered" -gt 8000 -a "$answered" -le 9072
	missing=$((sent - answered - refused)) # one in a hundred may be lost in a full buffer
	check "$name: whoever got none was counted" test "$missing" -ge 0 -a "$missing" -le $((sent / 100))
done
# shellcheck disable=SC2086 # words
check "ports: who had one goes on, and this node's own" round $talking own
for kind in tcp udp; do
	for family in 4 6; do
		check "ports: this node itself still gets one, IPv$family $kind" same \
			"$(talk node1 ask $kind "$(pod_address c "$family")" 8080 | cut -d ' ' -f 1-2)" "pod-c $(node_at "$family" c)"
	done
done
# What conntrack knows of a flow of ours is the client and the pod, by no port of ours.
# shellcheck disable=SC2086 # words
flows_ports $talking >"$world_dir/ours"
flows_ports own >"$world_dir/own"
of_range() { same "$(awk -v a="$2" -v z="$3" '$2 >= a && $2 <= z' "$world_dir/$1" | wc -l)" 8; } # FILE FIRST LAST: all of them
check "ports: ours are above those that the node takes for itself" of_range ours 61000 65535
check "ports: and the node's own are below" of_range own 1 60999
# shellcheck disable=SC2016 # of awk
tracked() { # conntrack holds all conversations, and nothing of this node's addresses at a port of ours
	on node1 awk 'NR == FNR { ours[$2]; next } / dport=8080 / { n++ }
		/=(192\.0\.2\.1|2001:0db8:[0:]*:0001) / { for (i = 1; i <= NF; i++) if ($i ~ /^[sd]port=/ && substr($i, 7) in ours) { print; bad = 1 } }
		END { print n " at port 8080"; exit bad || n < 16 }' "$world_dir/ours" /proc/net/nf_conntrack
}
check "ports: conntrack knows no connection by one of ours" tracked
for name in $talking own; do flows_end "$name"; done

agent_stop node1 TERM
lifter node1 --cleanup
agent_start node1
routes_by 1
on node2 sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.lan.rp_filter=1
on node2 nft add rule ip6 strict prerouting ip6 saddr != fe80::/10 ip6 saddr != :: fib saddr . iif oif missing counter drop
