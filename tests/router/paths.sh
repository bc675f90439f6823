# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# paths: what routers and hosts say of a path reaches who can make use of it, and is about
# what that one has sent.

watch

for way in $ways; do
	host=${way%:*} family=${way#*:}
	me=$(own "$host" "$family")
	name="$(link "$host"), IPv$family"
	for kind in tcp udp; do
		check "$name $kind: a pod of this node" same "$(talk "$host" ask $kind "$(vip "$family" 11)" 80 | cut -d ' ' -f 1-2)" "pod-a $me"
		check "$name $kind: a pod behind a router" same "$(talk "$host" ask $kind "$(vip "$family" 12)" 80 | cut -d ' ' -f 1-2)" "pod-h $me"
	done
	check "$name: a datagram in fragments, there and back" same "$(talk "$host" ask udp "$(vip "$family" 11)" 80 3300 | cut -d ' ' -f 1-2)" "pod-a $me"
done

### the MTU of a path

# narrow HOST V4 V6 HOW...: a road of MTU 1300; widen: no more
narrow() { route "$1" "$2" "$3" "${@:4}" mtu 1300; }
widen() {
	ip -n "$(world_ns "$1")" route delete "$2"
	ip -n "$(world_ns "$1")" -6 route delete "$3"
}
# too_long NUMBER POD: the client's sockets learn of 1300 from the service they speak with
too_long() {
	local way host family to name errors
	for way in $ways; do
		host=${way%:*} family=${way#*:} to=$(vip "${way#*:}" "$1")
		name="$(link "$host"), IPv$family: $2"
		errors=$(counter node1 icmp_error)
		check "$name: UDP learns the MTU" same "$(talk "$host" mtu udp "$to" 80)" \
			"EMSGSIZE from $to about $to:80, its own words, mtu 1300 1300, as long is answered"
		check "$name: it was an error of ours" test "$(counter node1 icmp_error)" -gt "$errors"
	done
	forget_paths
	for way in $ways; do
		host=${way%:*} family=${way#*:} to=$(vip "${way#*:}" "$1")
		check "$(link "$host"), IPv$family: $2: TCP learns the MTU" same "$(talk "$host" mtu tcp "$to" 80)" \
			"pod-$3 mtu $([ "$host" = client ] && echo 1420 || echo 1500) then 1300"
	done
	forget_paths
}
narrow node1 10.42.0.5 fd42::5 dev cni0
too_long 11 "a narrow road from this node" a
widen node1 10.42.0.5 fd42::5
narrow hop 10.42.9.5 fd42:0:0:9::5 dev cni0
too_long 12 "a narrow road behind a router" h
widen hop 10.42.9.5 fd42:0:0:9::5

### a path behind the client, which is too narrow for a reply

for host in $clients; do
	n=$([ $host = client ] && echo 102 || echo 103)
	host_behind $host guest-$host $n
	ip -n "$(world_ns $host)" link set to-guest-$host mtu 1300
	ip -n "$(world_ns guest-$host)" link set eth0 mtu 1300
done
route node1 198.18.102.0/24 2001:db8:102::/64 dev tailscale0
route node1 198.18.103.0/24 2001:db8:103::/64 via 100.99.0.7 fd99::7 dev vpn0
bridge_looks node1 0
# pod_knows ADDRESS: that the way there has an MTU of 1300
pod_knows() { on pod-a ip route get "$1" | grep -w "mtu 1300"; }
for way in $ways; do
	host=${way%:*} family=${way#*:} name="$(link "${way%:*}"), IPv${way#*:}: a narrow road behind the client"
	me=$([ "$family" = 4 ] && echo 198.18.N.5 || echo 2001:db8:N::5)
	me=${me/N/$([ "$host" = client ] && echo 102 || echo 103)}
	ask() { talk guest-"$host" ask udp "$(vip "$family" 11)" 80 1250; }
	errors=$(counter node1 icmp_error)
	check "$name: an answer is too long" same "$(PATIENCE=0.5 ask)" "timed out"
	check "$name: the pod has learnt it" pod_knows "$me"
	check "$name: by one error of ours" same "$(($(counter node1 icmp_error) - errors))" 1
	check "$name: its next answer arrives" same "$(ask | cut -d ' ' -f 1-2)" "pod-a $me"
done
bridge_looks node1 1

### what we say ourselves

# refusals: of a port that a service does not have, and by a service that has no backend
refusals() {
	local way host family name row to number port
	for way in $ways; do
		host=${way%:*} family=${way#*:}
		for row in "11 81 no_port" "33 80 no_backend"; do
			read -r number port reason <<<"$row"
			to=$(vip "$family" "$number") name="$(link "$host"), IPv$family, $reason"
			check "$name: TCP is refused" same "$(talk "$host" ask tcp "$to" "$port")" ECONNREFUSED
			check "$name: UDP is refused" same "$(talk "$host" refused "$to" "$port")" "ECONNREFUSED from $to about $to:$port, its own words"
			check "$name: UDP of 1300 bytes is refused" same "$(talk "$host" ask udp "$to" "$port" 1300)" ECONNREFUSED
		done
		for size in 8 1200; do
			check "$name: a ping of $size bytes is answered" on "$host" ping -c 1 -W 3 -s $size "$to"
		done
	done
}
refusals
watched paths unsure

### errors on the way and at its end

offload off
watch

for way in $ways; do
	host=${way%:*} family=${way#*:}
	me=$(own "$host" "$family") name="$(link "$host"), IPv$family"
	to=$(vip "$family" 12)
	check "$name: TTL exceeded at the node" same "$(talk "$host" ttl 1 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	check "$name: TTL exceeded at a router behind it" same "$(talk "$host" ttl 2 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	to=$(vip "$family" 16)
	check "$name: nobody listens in the pod" same "$(talk "$host" refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
	world_run pod-a ./talk.py late 9100 >"$world_dir/late"
	late=$world_pid
	soon 5 grep -q ready "$world_dir/late"
	check "$name: a client that leaves" talk "$host" leave "$(vip "$family" 17)" 80
	wait $late || true
	check "$name: its port unreachable reaches the pod" same "$(tail -n 1 "$world_dir/late")" \
		"ECONNREFUSED from $me about $me:PORT, its own words"
done
refusals
watched errors
offload on
