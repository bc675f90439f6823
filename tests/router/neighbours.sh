# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# neighbours: what others do on a node keeps working and keeps its say: tc programs, policies
# on the addresses of pods and clients, flannel's rules, tailscaled's.

watch

### tc programs before and behind ours

# answered SECONDS HOST ADDRESS PORT: one datagram; who answers it by then
answered() {
	on "$2" timeout "$1" bash -c 'exec 3<>"/dev/udp/$1/$2"; echo hello >&3; head -n 1 <&3' - "$3" "$4" || true
}
# They see what is there at their place: before us, on the way in, the service; behind us the pod.
for row in "ingress first 7101" "ingress last 8081" "ingress clsact 8081" "egress first 8081" "egress last 7101" "egress clsact 7101"; do
	read -r hook place port <<<"$row"
	case $port in 7101) victim=18 ;; *) victim=19 ;; esac
	for way in client:4:tailscale0 laptop:6:vpn0; do
		IFS=: read -r host family iface <<<"$way"
		me=$(own "$host" "$family") name="$(link "$host"), a program on $hook, $place"
		to="$(vip "$family" $victim) 710$((victim - 17))"
		# shellcheck disable=SC2086 # address and port
		{
			check "$name: without it" same "$(answered 3 "$host" $to)" "pod-a answers $me"
			world_run node1 "$NEIGHBOUR" "$NEIGHBOUR_BPF" $iface $hook $place $port >"$world_dir/neighbour"
			neighbour=$world_pid
			check "$name: it is there" soon 5 grep -q ready "$world_dir/neighbour"
			check "$name: what it drops is dropped" same "$(answered 0.3 "$host" $to)" ""
			check "$name: what it passes passes" same "$(answered 3 "$host" "$(vip "$family" 11)" 80)" "pod-a answers $me"
			kill $neighbour
			wait $neighbour || true
			check "$name: it has seen and dropped" grep -E '^seen [1-9][0-9]* dropped [1-9]' "$world_dir/neighbour"
			check "$name: after it" same "$(answered 3 "$host" $to)" "pod-a answers $me"
		}
	done
done

watched programs unsure

### policies on addresses of pods and clients

# policies TOOL CLIENT OTHER POD PROHIBITED: CLIENT may not reach pods at all, OTHER may not reach POD
policies() {
	rules node1 "$1" <<-E
		*filter
		-A FORWARD -s $2 -p tcp -j REJECT --reject-with tcp-reset
		-A FORWARD -s $2 -p udp -j REJECT --reject-with $5
		-A FORWARD -s $3 -d $4 -j DROP
		COMMIT
	E
}
for host in $clients; do
	v4=$(own "$host" 4) v6=$(own "$host" 6)
	for other in 8 9; do # addresses for those who ask for them only
		ip -n "$(world_ns "$host")" address add "${v4%7}$other/32" dev vpn1
		ip -n "$(world_ns "$host")" address add "${v6%7}$other/128" dev vpn1 nodad preferred_lft 0
	done
	policies iptables "${v4%7}8" "${v4%7}9" 10.42.0.5 icmp-admin-prohibited
	policies ip6tables "${v6%7}8" "${v6%7}9" fd42::5 icmp6-adm-prohibited
done
# policed SETTING: whatever pods see of the clients, policies see clients
policed() {
	local way host family name me to a c kind
	for way in $ways; do
		host=${way%:*} family=${way#*:}
		me=$(own "$host" "$family") to=$(vip "$family" 11)
		case $1 in *on) a=$(node_at "$family" a) c=$(node_at "$family" c) ;; *) a=$me c=${me%7}9 ;; esac
		name="$(link "$host"), IPv$family, policies, $1"
		# from SOURCE COMMAND...
		from() { SOURCE=${me%7}$1 talk "$host" "${@:2}"; }
		check "$name: a client that is refused, by TCP" same "$(from 8 ask tcp "$to" 80)" ECONNREFUSED
		check "$name: a client that is refused, by UDP" same "$(from 8 refused "$to" 80)" \
			"$([ "$family" = 4 ] && echo EHOSTUNREACH || echo EACCES) from $to about $to:80, its own words"
		check "$name: a client that is ignored by one pod" same "$(PATIENCE=0.4 from 9 ask tcp "$to" 80)" "timed out"
		check "$name: but not by another" same "$(from 9 ask tcp "$(vip "$family" 15)" 80 | cut -d ' ' -f 1-2)" "pod-c $c"
		for kind in tcp udp; do
			check "$name: a client that is welcome, $kind" same "$(talk "$host" ask $kind "$to" 80 | cut -d ' ' -f 1-2)" "pod-a $a"
		done
	done
}
offload off
watch
policed "--snat off"
agent_stop node1 TERM
agent_start node1 --snat on
doors_come() { lifter node1 --status -o json | jq -e '.interfaces | map(.name) | contains(["cni0", "lan"])'; }
check "policies, --snat on: there are doors towards pods" soon 5 doors_come
policed "--snat on"
agent_stop node1 TERM
lifter node1 --cleanup
agent_start node1
no_rules

### flannel's rules, tailscaled's, both

# Whom a pod sees: of this node, of another, behind a router
seen() { # SETTING HOST FAMILY POD
	local here=10.42.0.1 there=192.0.2.1 behind=10.42.8.1
	[ "$3" = 4 ] || here=fd42::1 there=2001:db8::1 behind=fd42:0:0:8::1
	case $1:$2:$4 in
	flannel:*:a | *:laptop:a | tailscaled:laptop:*) own "$2" "$3" ;;
	*:a) echo $here ;;
	*:c) echo $there ;;
	*:h) echo $behind ;;
	esac
}
for setting in flannel tailscaled both; do
	case $setting in flannel) flannel ;; tailscaled) tailscaled node1 ;; both) flannel && tailscaled node1 ;; esac
	for way in $ways; do
		host=${way%:*} family=${way#*:} name="$setting, $(link "${way%:*}"), IPv${way#*:}"
		for row in "a 11" "c 15" "h 12"; do
			for kind in tcp udp; do
				check "$name, $kind: pod-${row% *}" same "$(talk "$host" ask $kind "$(vip "$family" "${row#* }")" 80 | cut -d ' ' -f 1-2)" \
					"pod-${row% *} $(seen $setting "$host" "$family" "${row% *}")"
			done
		done
		to=$(vip "$family" 16)
		check "$name: nobody listens in the pod" same "$(talk "$host" refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
		to=$(vip "$family" 12)
		check "$name: TTL exceeded behind the node" same "$(talk "$host" ttl 2 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	done
	if [ $setting != flannel ]; then
		for tool in iptables ip6tables; do
			check "$setting, $tool: stateful filtering dropped nothing" same "$(on node1 $tool -nvxL ts-forward | awk '/DROP/ { print $1 }')" 0
		done
	fi
	no_rules
done

watched neighbours
offload on
