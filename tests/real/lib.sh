# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# lib.sh: the world in which tests/real/run plays: saying and waiting, the
# network, the cluster, the tailnet, the lifter. Sourced, changes nothing by itself
# but what is in the private namespaces that `run` enters first.

### saying what holds

passed=0 failed=0

# check NAME COMMAND...: one fact. What the command says is shown if it does not hold.
check() {
	local name=$1 said start=${EPOCHREALTIME/./}
	shift
	if said=$("$@" 2>&1); then
		passed=$((passed + 1))
		printf 'ok    %s (%d ms)\n' "$name" $(((${EPOCHREALTIME/./} - start) / 1000))
	else
		failed=$((failed + 1))
		printf 'FAIL  %s\n' "$name"
		sed 's/^/      /' <<<"$said"
	fi
}

# soon SECONDS COMMAND...: try until it holds; what it said last is shown if it never does.
soon() {
	local until=$((${EPOCHREALTIME/./} + $1 * 1000000)) said
	shift
	until said=$("$@" 2>&1); do
		((${EPOCHREALTIME/./} < until)) || { echo "$said"; echo "still not so: $*"; return 1; }
		sleep 0.1
	done
}

fails() { ! "$@"; }
same() { [ "$1" = "$2" ] || { printf 'is:     %s\nshould: %s\n' "$1" "$2"; return 1; }; }

### processes: each has a name, a log, and a pid that we know

declare -A pid

# start NAME NAMESPACE COMMAND...
start() {
	local name=$1 ns=$2
	shift 2
	nsenter --net="/run/netns/$ns" -- "$@" >>"$dir/$name.log" 2>&1 </dev/null &
	pid[$name]=$!
}
# stop NAME [SIGNAL]: ends it and waits for its end
stop() {
	kill -"${2:-TERM}" "${pid[$1]}" 2>/dev/null || true # dead already: a check will say so
	wait "${pid[$1]}" 2>/dev/null || true
}
alive() { kill -0 "${pid[$1]}" 2>/dev/null; }
in_ns() { nsenter --net="/run/netns/$1" -- "${@:2}"; }

show_logs() {
	local log
	for log in "$dir"/[!l]*.log "$dir/lifter.log"; do # the one that matters last
		[ -s "$log" ] || continue
		echo "--- the end of ${log##*/}"
		tail -n 25 "$log" | tr -d '\000'
	done
}

### the network (drawn at the head of `run`)

. "$here/../flannel.sh"

# join HOST NUMBER: a host on the underlay, with a way out that leads nowhere and counts
join() {
	ip netns add "$1"
	ip -n "$1" link set lo up
	ip link add "to-$1" type veth peer name eth0 netns "$1"
	ip link set "to-$1" master lan up
	ip -n "$1" address add "192.0.2.$2/24" dev eth0
	ip -n "$1" address add "2001:db8::$2/64" dev eth0 nodad
	ip -n "$1" link set eth0 up
	ip -n "$1" link add outside type veth peer name nowhere
	in_ns "$1" sysctl -qw net.ipv6.conf.outside.addr_gen_mode=1 net.ipv6.conf.nowhere.disable_ipv6=1
	ip -n "$1" link set outside up arp off
	ip -n "$1" link set nowhere up
	ip -n "$1" route add default dev outside
	ip -n "$1" -6 route add default dev outside
	# private networks end here: tailscaled tries each address that its peer has
	ip -n "$1" route add unreachable 10.0.0.0/8
	ip -n "$1" route add unreachable 100.64.0.0/10
	ip -n "$1" -6 route add unreachable fd00::/8
	local count # of all but IPv6's own housekeeping; and of what conntrack cannot place
	for count in iptables ip6tables; do
		in_ns "$1" $count -t mangle -A POSTROUTING -o outside ! -p ipv6-icmp
		in_ns "$1" $count -t mangle -A FORWARD -m conntrack --ctstate INVALID
	done
}

# What tried to leave by that way: packets.
left_for_outside() {
	in_ns "$1" iptables -t mangle -nvxL POSTROUTING >"$dir/left"
	in_ns "$1" ip6tables -t mangle -nvxL POSTROUTING >>"$dir/left"
	awk '/outside/ { n += $1 } END { print n }' "$dir/left"
}

invalid() {
	in_ns "$1" iptables -t mangle -nvxL FORWARD >"$dir/invalid"
	in_ns "$1" ip6tables -t mangle -nvxL FORWARD >>"$dir/invalid"
	awk '/INVALID/ { n += $1 } END { print n }' "$dir/invalid"
}

# pod_network HOST NUMBER: a node as k3s leaves it: bridge, forwarding, flannel's rules
pod_network() {
	local rules
	ip -n "$1" link add cni0 mtu 1450 type bridge
	ip -n "$1" address add "10.42.$2.1/24" dev cni0
	ip -n "$1" address add "fd42:0:0:$2::1/64" dev cni0 nodad
	ip -n "$1" link set cni0 up
	in_ns "$1" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
	for rules in "iptables 10.42.0.0/16 10.42.$2.0/24 224.0.0.0/4" "ip6tables fd42::/56 fd42:0:0:$2::/64 ff00::/8"; do
		# shellcheck disable=SC2086 # four words
		flannel_rules "$1" $rules
	done
}

# pod NAME HOST HOST-NUMBER NUMBER: its namespace and what it serves
pod() {
	ip netns add "$1"
	ip -n "$1" link set lo up
	ip link add eth0 mtu 1450 netns "$1" type veth peer name "$1" netns "$2"
	ip -n "$2" link set "$1" master cni0 up
	ip -n "$1" address add "10.42.$3.$4/24" dev eth0
	ip -n "$1" address add "fd42:0:0:$3::$4/64" dev eth0 nodad
	ip -n "$1" link set eth0 up
	ip -n "$1" route add default via "10.42.$3.1"
	ip -n "$1" -6 route add default via "fd42:0:0:$3::1"
	start "$1" "$1" python3 "$here/pod.py" serve "$1" "$dir/file"
}

# The namespaces that `run` has entered are ours alone: so are the names of the
# network namespaces, locks and sockets in /run, bpffs, and whom names are asked from.
own_world() {
	mount --make-rprivate /
	mount -t tmpfs tmpfs /run
	mount -t bpf bpf /sys/fs/bpf
	dir=/run/test
	mkdir "$dir"
	echo "nameserver 203.0.113.53" >"$dir/resolv.conf"
	[ ! -f /etc/resolv.conf ] || mount --bind "$dir/resolv.conf" /etc/resolv.conf
}

network() {
	ip link set lo up
	ip link add lan type bridge
	ip address add 192.0.2.1/24 dev lan
	ip address add 2001:db8::1/64 dev lan nodad
	ip link set lan up
	join client 2
	join node 3
	join node2 4
	pod_network node 0
	pod_network node2 1
	ip -n node route add 10.42.1.0/24 via 192.0.2.4
	ip -n node route add fd42:0:0:1::/64 via 2001:db8::4
	ip -n node2 route add 10.42.0.0/24 via 192.0.2.3
	ip -n node2 route add fd42::/64 via 2001:db8::3
	head -c 64M /dev/urandom >"$dir/file"
	pod pod-a node 0 11
	pod pod-b node 0 12
	pod pod-c node2 1 11
	# one hop that leaves checksums to nobody
	in_ns pod-b ethtool -K eth0 tx off >/dev/null
	in_ns node ethtool -K pod-b tx off >/dev/null
	local at
	for at in 10.42.0.11 10.42.0.12 10.42.1.11 '[fd42::11]' '[fd42::12]' '[fd42:0:0:1::11]'; do
		soon 10 in_ns node curl -gsS "http://$at:8080/"
	done
}

### certificates, as k3s has them: ECDSA, one authority for the server, one for clients

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$dir/$1.key"; }
authority() {
	key "$1"
	openssl req -x509 -new -key "$dir/$1.key" -subj "/CN=$1" -days 2 -out "$dir/$1.crt"
}
# certificate AUTHORITY NAME SUBJECT [SUBJECT-ALT-NAMES]
certificate() {
	key "$2"
	openssl req -new -key "$dir/$2.key" -subj "$3" |
		openssl x509 -req -CA "$dir/$1.crt" -CAkey "$dir/$1.key" -set_serial "0x$RANDOM$RANDOM" -days 2 \
			${4:+-extfile <(echo "subjectAltName=$4")} -out "$dir/$2.crt" 2>/dev/null
	cat "$dir/$1.crt" >>"$dir/$2.crt"
}
# kubeconfig NAME [IDENTITY [SERVER-CA [SERVER]]]: as k3s writes its kubeproxy.kubeconfig
kubeconfig() {
	cat >"$dir/$1.kubeconfig" <<-E
		apiVersion: v1
		clusters:
		- cluster:
		    certificate-authority: $dir/${3:-server-ca}.crt
		    server: ${4:-https://127.0.0.1:6444}
		  name: local
		contexts:
		- context:
		    cluster: local
		    user: user
		  name: Default
		current-context: Default
		kind: Config
		preferences: {}
		users:
		- name: user
		  user:
		    client-certificate: $dir/${2:-$1}.crt
		    client-key: $dir/${2:-$1}.key
	E
}

### the cluster

etcd() {
	start etcd node "$cluster/etcd" --data-dir="$dir/etcd" --unsafe-no-fsync \
		--listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
		--listen-peer-urls=http://127.0.0.1:2380 --log-level=warn "$@"
}

# api_server [PORT]: the one at 6444, or another beside it
api_server() {
	local port=${1:-6444} name=kube-apiserver${1:+-$1}
	start "$name" node "$cluster/kube-apiserver" \
		--etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port="$port" \
		--advertise-address=127.0.0.1 --endpoint-reconciler-type=none \
		--service-cluster-ip-range=10.43.0.0/16,fd43::/112 \
		--tls-cert-file="$dir/server.crt" --tls-private-key-file="$dir/server.key" \
		--client-ca-file="$dir/client-ca.crt" --authorization-mode=Node,RBAC --anonymous-auth=false \
		--service-account-issuer=https://kubernetes.default.svc \
		--service-account-key-file="$dir/service-account.key" --service-account-signing-key-file="$dir/service-account.key"
}

kubectl() { # api=PORT asks another API server
	in_ns node "$cluster/kubectl" --kubeconfig="$dir/admin.kubeconfig" --server="https://127.0.0.1:${api:-6444}" --cache-dir="$dir/kubectl" "$@"
}

cluster_up() {
	authority server-ca
	authority client-ca
	certificate server-ca server /CN=kube-apiserver IP:127.0.0.1,DNS:kubernetes.default.svc
	certificate client-ca admin /O=system:masters/CN=admin
	certificate client-ca kubeproxy /CN=system:kube-proxy
	certificate client-ca nobody /CN=nobody
	certificate server-ca stranger /CN=system:kube-proxy # the right name, by the wrong authority
	key service-account
	for who in admin kubeproxy nobody stranger; do kubeconfig "$who"; done
	etcd
	api_server
	soon 120 kubectl get --raw /readyz
	soon 30 kubectl get clusterrolebinding/system:node-proxier service/kubernetes
}

# Those of its controllers that concern us; none that would miss a kubelet.
controller_manager() {
	start kube-controller-manager node "$cluster/kube-controller-manager" --kubeconfig="$dir/admin.kubeconfig" \
		--controllers=endpointslice-controller,endpointslice-mirroring-controller,serviceaccount-controller \
		--leader-elect=false --mirroring-endpointslice-updates-batch-period=100ms --endpointslice-updates-batch-period=100ms
	soon 30 kubectl get serviceaccount default
}

# The Node objects, as kube-proxy wants them; nobody runs anything on them.
nodes() {
	local row
	for row in "node 192.0.2.3" "node2 192.0.2.4"; do
		kubectl create -f - <<-E
			{apiVersion: v1, kind: Node, metadata: {name: ${row% *}, labels: {kubernetes.io/hostname: ${row% *}}}}
		E
		kubectl patch node "${row% *}" --subresource=status \
			-p "{\"status\":{\"addresses\":[{\"type\":\"InternalIP\",\"address\":\"${row#* }\"}]}}"
	done
}

# kube_proxy MODE: the real one, in the node's namespace, at work; proxy_gone: and no more
kube_proxy() {
	start kube-proxy node "$cluster/kube-proxy" --kubeconfig="$dir/kubeproxy.kubeconfig" --proxy-mode="$1" \
		--hostname-override=node --cluster-cidr=10.42.0.0/16,fd42::/56 \
		--conntrack-max-per-core=0 --conntrack-min=0
	soon 30 in_ns pod-b curl -gsS --max-time 2 -o /dev/null http://10.43.0.81/
}
proxy_gone() {
	stop kube-proxy
	in_ns node "$cluster/kube-proxy" --cleanup
	fails in_ns pod-b curl -gs --max-time 2 -o /dev/null http://10.43.0.81/
}

# service NAME NUMBER [PORT]: 10.43.0.NUMBER and fd43::NUMBER; TCP at PORT (80), UDP at 53
service() {
	kubectl apply -f - <<-E
		apiVersion: v1
		kind: Service
		metadata: {name: $1}
		spec:
		  ipFamilyPolicy: RequireDualStack
		  ipFamilies: [IPv4, IPv6]
		  clusterIP: 10.43.0.$2
		  clusterIPs: [10.43.0.$2, "fd43::$2"]
		  ports:
		  - {name: http, protocol: TCP, port: ${3:-80}}
		  - {name: echo, protocol: UDP, port: 53}
	E
}

declare -A place=([pod-a]="10.42.0.11 fd42::11 node" [pod-b]="10.42.0.12 fd42::12 node" [pod-c]="10.42.1.11 fd42:0:0:1::11 node2")

# endpoints SERVICE POD...: its two slices, as the slice controller would write them
endpoints() {
	local family pod four six host
	for family in IPv4 IPv6; do
		cat <<-E
			---
			apiVersion: discovery.k8s.io/v1
			kind: EndpointSlice
			metadata:
			  name: $1-${family,,}
			  labels: {kubernetes.io/service-name: $1}
			addressType: $family
			ports:
			- {name: http, protocol: TCP, port: 8080}
			- {name: echo, protocol: UDP, port: 9090}
			endpoints:
		E
		for pod in "${@:2}"; do
			read -r four six host <<<"${place[$pod]}"
			[ $family = IPv6 ] || six=$four
			echo "- {addresses: [\"$six\"], nodeName: $host, conditions: {ready: true, serving: true, terminating: false}}"
		done
		(($# > 1)) || echo "  []"
	done | kubectl apply -f -
}

# slice SERVICE ADDRESS PORT-NAME PORT PROTOCOL: one of IPv4 with one endpoint and no node
slice() {
	kubectl apply -f - <<-E
		apiVersion: discovery.k8s.io/v1
		kind: EndpointSlice
		metadata:
		  name: $1-$3
		  labels: {kubernetes.io/service-name: $1}
		addressType: IPv4
		ports:
		- {name: $3, protocol: $5, port: $4}
		endpoints:
		- {addresses: ["$2"], conditions: {ready: true}}
	E
}

### the wire is watched, by ../router/wire.c

# watch: every packet on every interface of the hosts; not of bulk transfers, for none may be
# missed. watched NAME: there was nothing wrong, and nothing of pods reached the client bare.
watch() {
	"$WIRE" check client,10.42.,fd42: node node2 pod-a pod-b pod-c >"$dir/wire" 2>&1 &
	pid[wire]=$!
	soon 5 grep -q ready "$dir/wire"
}
watched() {
	stop wire
	check "$1: every packet on every wire was right: $(tail -n 1 "$dir/wire")" right
}
right() { head -n 30 "$dir/wire"; tail -n 1 "$dir/wire" | grep -qE '^packets [1-9].* wrong 0 strays 0 lost 0$'; }

### the tailnet

tailscale() { "$tailnet/tailscale" --socket="$dir/$1.sock" "${@:2}"; }
headscale() { "$tailnet/headscale" --config "$dir/headscale.yaml" "$@"; }

tailscaled() {
	start "tailscaled-$1" "$1" env SSL_CERT_FILE="$dir/lan-ca.crt" TS_NO_LOGS_NO_SUPPORT=true \
		TS_PANIC_IF_HIT_MAIN_CONTROL=true TS_DEBUG_FIREWALL_MODE=iptables \
		"$tailnet/tailscaled" --no-logs-no-support --tun=tailscale0 --port=41641 \
		--statedir="$dir/$1.state" --socket="$dir/$1.sock"
}

# tailscale_up HOST FLAGS...
tailscale_up() {
	tailscale "$1" up --login-server=https://192.0.2.1 --auth-key="$auth_key" --hostname="$1" \
		--accept-dns=false --timeout=30s "${@:2}" >>"$dir/tailscale-up.log" 2>&1
}

tailnet_up() {
	authority lan-ca
	certificate lan-ca headscale /CN=headscale IP:192.0.2.1
	cat >"$dir/headscale.yaml" <<-E
		server_url: https://192.0.2.1
		listen_addr: 192.0.2.1:443
		metrics_listen_addr: ""
		grpc_listen_addr: 127.0.0.1:50443
		tls_cert_path: $dir/headscale.crt
		tls_key_path: $dir/headscale.key
		noise: {private_key_path: $dir/noise.key}
		prefixes: {v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48"}
		derp:
		  server:
		    enabled: true
		    region_id: 999
		    region_code: lan
		    region_name: lan
		    stun_listen_addr: 192.0.2.1:3478
		    private_key_path: $dir/derp.key
		    ipv4: 192.0.2.1
		  urls: []
		  auto_update_enabled: false
		disable_check_updates: true
		database: {type: sqlite, sqlite: {path: $dir/headscale.db}}
		dns: {magic_dns: false, override_local_dns: false, base_domain: tailnet.test}
		logtail: {enabled: false}
		unix_socket: $dir/headscale.sock
		log: {level: info}
	E
	"$tailnet/headscale" --config "$dir/headscale.yaml" serve >>"$dir/headscale.log" 2>&1 </dev/null &
	pid[headscale]=$!
	soon 30 headscale users create tester
	auth_key=$(headscale preauthkeys create --user 1 --reusable --output json | jq -r .key)
	tailscaled client
	tailscaled node
	tailscale_up client --accept-routes
	tailscale_up node --advertise-routes=10.43.0.0/16,fd43::/112
	id=$(headscale nodes list --output json | jq '.[] | select(.given_name == "node") | .id')
	headscale nodes approve-routes --identifier "$id" --routes 10.43.0.0/16,fd43::/112 >/dev/null
	soon 30 client_has_routes
	client4=$(tailscale client ip -4) client6=$(tailscale client ip -6)
	soon 30 tailscale client ping --until-direct --timeout 2s "$(tailscale node ip -4)"
}
client_has_routes() {
	ip -n client route show table 52 | grep -F 10.43.0.0/16 &&
		ip -n client -6 route show table 52 | grep -F fd43::/112
}

### what k3s/ ships: its manifests, and what a kubelet puts beside their containers

manifests=$here/../../k3s
secrets=/run/secrets/kubernetes.io/serviceaccount # /var/run is /run, and that is ours
agent=system:serviceaccount:kube-system:tail-lifter

# token NAME: a new one, good until the Secret of that name goes; placed as a kubelet does
token() {
	kubectl -n kube-system create secret generic "$1" >/dev/null
	mkdir -p "$secrets/..$1"
	cp "$dir/server-ca.crt" "$secrets/..$1/ca.crt"
	kubectl -n kube-system create token tail-lifter --bound-object-kind Secret --bound-object-name "$1" >"$secrets/..$1/token"
	ln -sfn "..$1" "$secrets/..new"
	mv -T "$secrets/..new" "$secrets/..data"
	ln -sfn ..data/token "$secrets/token"
	ln -sfn ..data/ca.crt "$secrets/ca.crt"
}
### the lifter

pins=/sys/fs/bpf/tail_lifter-test

# lifter ARGUMENTS...: the agent in the background;  lift ARGUMENTS...: a command of it
lifter() {
	start lifter node "$TAIL_LIFTER" --iface tailscale0 --kubeconfig "$dir/kubeproxy.kubeconfig" \
		--node node --pin-dir "$pins" "$@"
}
lift() { in_ns node "$TAIL_LIFTER" --pin-dir "$pins" "$@"; }

### asking as the client does

# tcp, udp, udp_long ADDRESS PORT: 24 connections; who answered, and whom they saw
tcp() {
	local i host=$1
	[[ $host != *:* ]] || host=[$host]
	for i in {1..24}; do
		in_ns client curl -gsS --max-time 5 "http://$host:$2/" || { echo "no answer $i"; return 1; }
	done
}
udp() { # each time from ports never used before: conntrack remembers a port for minutes
	local from
	from=$(cat "$dir/ports" 2>/dev/null || echo 2000)
	echo $((from + 24)) >"$dir/ports"
	in_ns client python3 "$here/pod.py" ask "$1" "$2" "$from" 24 "${@:3}"
}
udp_long() { udp "$@" 1200; }

# answers PROTOCOL ADDRESS PORT "POD SEEN-ADDRESS"...: these answer, and no others
answers() {
	local said
	said=$("$1" "$2" "$3") || { echo "$said"; return 1; }
	same "$(cut -d' ' -f1,2 <<<"$said" | sort -u)" "$(printf '%s\n' "${@:4}" | sort)"
}
