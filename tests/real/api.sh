# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# api.sh: a part of tests/real/run: what controllers write is served, the manifests
# in k3s/ are what a server takes and just enough, credentials change under way,
# and the API server does the worst it can while traffic runs. Expects a lifter
# that runs, and leaves one.

### what the controllers of a real cluster write

# selecting NAME NUMBER: a service with a selector, whose target ports are names
selecting() {
	kubectl apply -f - <<-E
		apiVersion: v1
		kind: Service
		metadata: {name: $1}
		spec:
		  selector: {app: $1}
		  ipFamilyPolicy: RequireDualStack
		  clusterIP: 10.43.0.$2
		  clusterIPs: [10.43.0.$2, "fd43::$2"]
		  ports:
		  - {name: web, protocol: TCP, port: 80, targetPort: http}
		  - {name: echo, protocol: UDP, port: 53, targetPort: 9090}
	E
}
# pod_object NAME APP: the object of a pod that runs already, as its kubelet would keep it
pod_object() {
	local four six host
	read -r four six host <<<"${place[$1]}"
	kubectl create -f - <<-E
		apiVersion: v1
		kind: Pod
		metadata: {name: $1, labels: {app: $2}}
		spec:
		  nodeName: $host
		  containers: [{name: serve, image: none, ports: [{name: http, containerPort: 8080}]}]
	E
	kubectl patch pod "$1" --subresource=status -p "{\"status\":{\"phase\":\"Running\",
		\"podIP\":\"$four\",\"podIPs\":[{\"ip\":\"$four\"},{\"ip\":\"$six\"}]}}"
	ready "$1" True
}
ready() {
	kubectl patch pod "$1" --subresource=status -p "{\"status\":{\"conditions\":[{\"type\":\"Ready\",\"status\":\"$2\"}]}}"
}

echo "# what controllers write"
quietly selecting chosen 70
check "rule 15: a selector without pods: connection refused" soon 10 refused 10.43.0.70
quietly pod_object pod-a chosen
quietly pod_object pod-b chosen
check "a selector with two pods: both answer by TCP" soon 20 both tcp 10.43.0.70 80 "$client4"
check "a selector with two pods: both answer by UDP" soon 10 both udp fd43::70 53 "$client6"
quietly ready pod-a False
check "rule 7: a pod that is not ready: the other one answers" soon 10 one 10.43.0.70 80 pod-b
quietly kubectl delete pod pod-b --wait=false
check "rule 7: no pod but one that is serving and terminating: it answers" soon 10 one 10.43.0.70 80 pod-b
quietly kubectl delete pod pod-a pod-b --force
check "rule 15: no pods: connection refused" soon 10 refused 10.43.0.70

quietly service mirrored 71
mirrored() { # POD: the Endpoints that someone still writes by hand
	local four six
	read -r four six _ <<<"${place[$1]}"
	kubectl apply -f - 2>/dev/null <<-E
		apiVersion: v1
		kind: Endpoints
		metadata: {name: mirrored}
		subsets:
		- addresses: [{ip: $four}, {ip: "$six"}]
		  ports: [{name: http, port: 8080}, {name: echo, port: 9090, protocol: UDP}]
	E
}
quietly mirrored pod-a
check "Endpoints, mirrored to slices: IPv4" soon 20 one 10.43.0.71 80 pod-a
check "Endpoints, mirrored to slices: IPv6" soon 10 answers udp fd43::71 53 "pod-a $client6"
quietly mirrored pod-b
check "Endpoints changed: the other one answers" soon 10 one 10.43.0.71 80 pod-b
stop lifter

### k3s/tail-lifter.yaml and k3s/teardown.yaml

# as_shipped ARGUMENTS...: with what the DaemonSet gives to its container, and no more
as_shipped() {
	exec env -i NODE_NAME=node KUBERNETES_SERVICE_HOST=127.0.0.1 KUBERNETES_SERVICE_PORT=6444 \
		unshare --mount sh -c 'mount -o remount,bind,ro / && exec "$@"' - \
		setpriv --no-new-privs --bounding-set=-all,+bpf,+net_admin --inh-caps=-all \
		"$TAIL_LIFTER" --pin-dir "$pins" "$@"
}
shipped="$(declare -p TAIL_LIFTER pins); $(declare -f as_shipped); as_shipped \"\$@\""
shipped_lifter() {
	start lifter node "$BASH" -c "$shipped" - --iface tailscale0 -v -v
}
# disconnect: every connection to the API server breaks
disconnect() { in_ns node ss -K dst 127.0.0.1 dport = 6444 2>/dev/null >&2 || true; }
# heard PATTERN: the lifter has said it since `listen`
listen() { heard_from=$(wc -c <"$dir/lifter.log"); }
heard() { tail -c +$((heard_from + 1)) "$dir/lifter.log" | grep -E "$1"; }

echo "# what README says of other clusters"
# The commands as they stand there, but for the two names that are said to be others'.
user_of_its_own() (
	cd "$dir" || exit
	sed -n '/^## On other clusters/,/^## /s/^    //p' "$manifests/../README.md" |
		sed "s#API-SERVER:6443#127.0.0.1:6444#; s#CA.crt#$dir/server-ca.crt#" >others
	kubectl() {
		case $1 in
		config) in_ns node "$cluster/kubectl" "$@" ;; # by $KUBECONFIG
		*) in_ns node "$cluster/kubectl" --kubeconfig="$dir/admin.kubeconfig" --cache-dir="$dir/kubectl" "$@" ;;
		esac
	}
	# shellcheck disable=SC1091
	. ./others
)
by_that_user() { in_ns node "$TAIL_LIFTER" "$1" --kubeconfig "$dir/tail_lifter.kubeconfig" --node node --iface tailscale0 "${@:2}"; }
check "README: a user for the bare file" user_of_its_own
check "README: that user sees the services" eval 'by_that_user --dry-run 2>/dev/null | grep -q "10.43.0.80"'
for verb in list watch; do
	for kind in services endpointslices nodes servicecidrs; do
		check "README: that user may $verb $kind" eval "by_that_user --check | grep -E '^ok +$verb $kind +allowed'"
	done
done
kubectl -n kube-system delete serviceaccount/tail-lifter clusterrole/tail-lifter clusterrolebinding/tail-lifter >/dev/null

echo "# the manifests"
check "tail-lifter.yaml: a server takes it" kubectl apply --dry-run=server -f "$manifests/tail-lifter.yaml"
check "teardown.yaml: a server takes it" kubectl apply --dry-run=server -f "$manifests/teardown.yaml"
quietly kubectl apply -f "$manifests/tail-lifter.yaml"
pods_of() {
	kubectl apply --dry-run=server -o json -f "$manifests/$1" | jq 'if .items then .items[] else . end | select(.kind == "DaemonSet") |
		.spec.template + {apiVersion: "v1", kind: "Pod"} | .metadata += {name: "t", namespace: "kube-system"}' |
		kubectl create --dry-run=server -f -
}
everywhere() { # FILE: its pods are on every node, before others, with all that is asked and limited
	kubectl apply --dry-run=server -o json -f "$manifests/$1" | jq -e 'if .items then .items[] else . end |
		select(.kind == "DaemonSet") | .spec.template.spec | .tolerations == [{operator: "Exists"}] and .hostNetwork and
		.nodeSelector == {"kubernetes.io/os": "linux"} and .priorityClassName == "system-node-critical" and
		(.containers[0].resources | .requests.cpu and .requests.memory and .limits.memory)'
}
for file in tail-lifter teardown; do
	check "$file.yaml: a server takes its pods" pods_of $file.yaml
	check "$file.yaml: on every node" everywhere $file.yaml
done
quietly token one
listen
shipped_lifter
check "with its ServiceAccount, its capabilities, a read-only root: in sync" soon 20 heard "services and .* slices from"
check "with these: --status says so" status_is '.agent.running and .agent.synced'
check "with these: both pods answer" both tcp 10.43.0.80 80 "$client4"
check "with these: changes take effect" eval 'quietly endpoints hollow pod-a && soon 10 one 10.43.0.82 8000 pod-a'
quietly kubectl label node node topology.kubernetes.io/zone=z1
check "our Node gets a zone" soon 10 status_is '.zone == "z1"'
quietly kubectl label node node topology.kubernetes.io/zone-
check "our Node has none any more" soon 10 status_is '.zone == ""'

# lacks RESOURCE VERB: it asks without that right, and says what it lacks
lacks() {
	local said how=--dry-run
	[ "$2" = list ] || how="--iface none0 --pin-dir $pins-lacks"
	# shellcheck disable=SC2086 # a list
	said=$(in_ns node timeout 3 "$BASH" -c "$shipped" - $how 2>&1 >/dev/null) || true
	echo "$said"
	grep -q "403: we may not $2 $1:" <<<"$said"
}
# check_tells RESOURCE VERB WORD: so does --check
check_tells() {
	local said
	said=$(in_ns node timeout 60 "$BASH" -c "$shipped" - --check --iface tailscale0 2>&1) || true
	echo "$said"
	grep -qE "^$3 +$2 $1 " <<<"$said"
}
# goes_on VERB: without that right to servicecidrs it is in sync all the same, and says nothing of it
goes_on() {
	local said how=--dry-run
	soon 10 eval "same \"\$(kubectl auth can-i $1 servicecidrs --as=$agent)\" no" || return
	[ "$1" = list ] || how="--iface none0 --pin-dir $pins-lacks"
	# shellcheck disable=SC2086 # a list
	said=$(in_ns node timeout 10 "$BASH" -c "$shipped" - $how 2>&1 >"$dir/printed") || true
	echo "$said"
	fails grep -E '403: we may not|servicecidrs' <<<"$said" || return
	if [ "$1" = list ]; then grep -q '10.43.0.80' "$dir/printed"; else grep -q 'services and .* slices from' <<<"$said"; fi
}
role() { kubectl get clusterrole tail-lifter -o json; }
whole=$(role | jq 'del(.metadata.resourceVersion)')
check "nothing is lacking" fails heard '403: we may not'
for row in {services,endpointslices,nodes}-{list,watch}; do
	jq --arg r "${row%-*}" --arg v "${row#*-}" '(.rules[] | select(.resources == [$r]) | .verbs) -= [$v]' <<<"$whole" | quietly kubectl replace -f -
	check "without the right to ${row#*-} ${row%-*}: it says so" soon 30 lacks "${row%-*}" "${row#*-}"
	word=FIX
	[ "${row%-*}" != nodes ] || word=hint
	check "without the right to ${row#*-} ${row%-*}: --check says so" check_tells "${row%-*}" "${row#*-}" $word
done
for verb in list watch; do
	jq --arg v $verb '(.rules[] | select(.resources == ["servicecidrs"]) | .verbs) -= [$v]' <<<"$whole" | quietly kubectl replace -f -
	check "without the right to $verb servicecidrs: it goes on and does not say so" goes_on $verb
	check "without the right to $verb servicecidrs: --check says so" check_tells servicecidrs $verb hint
done
quietly kubectl replace -f - <<<"$whole"
for row in {services,endpointslices,nodes,servicecidrs}-{list,watch}; do
	check "with the right to ${row#*-} ${row%-*}: --check says so" soon 10 check_tells "${row%-*}" "${row#*-}" ok
done
"$TAIL_LIFTER" --cleanup --pin-dir "$pins-lacks"
check "no right to anything else" same "$(jq -c '[.rules[] | .resources[] as $r | .verbs[] | "\(.) \($r)"] | sort' <<<"$whole")" \
	'["list endpointslices","list nodes","list servicecidrs","list services","watch endpointslices","watch nodes","watch servicecidrs","watch services"]'

echo "# credentials change under way"
quietly token two
quietly kubectl -n kube-system delete secret one
sleep 11 # the server remembers a good token for ten seconds
listen
disconnect
check "the token's file was replaced, the old one revoked: changes take effect" \
	eval 'quietly endpoints hollow pod-b && soon 40 one 10.43.0.82 8000 pod-b'
check "nothing was refused" fails heard '401: '
quietly kubectl -n kube-system delete secret two
sleep 11
disconnect
check "the token was revoked: it says so" soon 20 heard '401.*token'
check "the token was revoked: both pods answer" both tcp 10.43.0.80 80 "$client4"
quietly token three
check "another token is there: changes take effect" eval 'quietly endpoints hollow pod-a && soon 40 one 10.43.0.82 8000 pod-a'
stop lifter

copy() { cp "$dir/$1.$2" "$dir/rotating.new" && mv "$dir/rotating.new" "$dir/rotating.$2"; }
for file in crt key; do copy kubeproxy $file; done
kubeconfig rotating
listen
start lifter node "$TAIL_LIFTER" --iface tailscale0 --kubeconfig "$dir/rotating.kubeconfig" --node node --pin-dir "$pins" -v -v
check "a client certificate: in sync" soon 20 heard "services and .* slices from"
check "the first list comes in pages" heard 'services: listing'
check "and not as a stream" fails heard 'services: streaming'
certificate client-ca kubeproxy /CN=system:kube-proxy
copy nobody crt # and not yet its key
listen
disconnect
quietly endpoints hollow pod-b
check "another certificate without its key: it says so, uses what it has" soon 10 eval 'heard rotating && one 10.43.0.82 8000 pod-b'
copy nobody key
disconnect
check "the certificate of someone without rights: it says so" soon 20 heard '403: we may not'
for file in crt key; do copy kubeproxy $file; done
check "a new certificate: changes take effect" eval 'quietly endpoints hollow pod-a && soon 40 one 10.43.0.82 8000 pod-a'

### the worst

# kube-apiserver is killed here: asked to stop, it would keep its watches open for a
# minute (`run` does that).

etcd_post() { in_ns node curl -sS --fail "http://127.0.0.1:2379/v3/$1" -d "$2"; }
# traffic_on, traffic_off: new connections one after another, a line "MILLISECONDS FAILURE" each that fails
traffic_on() {
	rm -f "$dir/enough"
	: >"$dir/broken"
	(
		local begun
		until [ -e "$dir/enough" ]; do
			begun=$(now) # not when it gave up
			asks 10.43.0.80 6 >"$dir/asked" || echo "$begun $(tr '\n' ' ' <"$dir/asked")" >>"$dir/broken"
		done
	) &
	traffic=$!
}
traffic_off() { touch "$dir/enough"; wait "$traffic" || true; }
# counts: how many services there are, a line whenever that changes, until `enough`
counts() {
	local n seen='' last='' # seen twice: a look may fall between two writes
	until [ -e "$dir/enough" ]; do
		n=$(lift --status -o json | jq '[.services[].name] | unique | length')
		[ "$n" != "$seen" ] || [ "$n" = "$last" ] || { echo "$n"; last=$n; }
		seen=$n
		sleep 0.02
	done
}
now() { echo $((${EPOCHREALTIME/./} / 1000)); }

echo "# the API server is away, services change behind it, and their history is gone"
traffic_on
listen
api_server 6445
soon 60 eval 'api=6445 kubectl get --raw /readyz' >/dev/null
stop kube-apiserver KILL
api=6445
quietly kubectl delete service only-a
quietly kubectl delete endpointslice only-a-ipv4 only-a-ipv6
quietly service late 90
quietly endpoints late pod-a pod-b
quietly endpoints hollow pod-b
unset api
sleep 60
check "a minute without it: what was there is served" one 10.43.0.82 8000 pod-a
check "a minute without it: it says so, and not at each try" eval 'heard "trying again"; [ "$(heard "trying again" | wc -l)" -le 2 ]'
stop kube-apiserver-6445 KILL
revision=$(etcd_post kv/range '{"key":"AA=="}' | jq -r .header.revision)
quietly etcd_post kv/compaction "{\"revision\":$revision,\"physical\":true}"
api_server
soon 60 kubectl get --raw /readyz >/dev/null
check "back: a service made meanwhile is served" soon 60 both tcp 10.43.0.90 80 "$client4"
check "back: endpoints changed meanwhile are served" soon 10 one 10.43.0.82 8000 pod-b
check "back: a service deleted meanwhile is gone" soon 10 status_is '[.services[] | select(.name == "only-a")] == []'
check "back: it listed anew" heard 'services: (streaming|listing)'
# of four watches, each after a pause of up to 30 s, perhaps two, and 5 s
check "back: in touch again" soon 70 heard 'in touch again'
# who has failed often of late lists anew without asking for the rest; who slept asks
listen
kill -STOP "${pid[lifter]}"
stop kube-apiserver KILL
revision=$(etcd_post kv/put "{\"key\":\"$(base64 <<<later)\"}" | jq -r .header.revision)
quietly etcd_post kv/compaction "{\"revision\":$revision,\"physical\":true}"
api_server
soon 60 kubectl get --raw /readyz >/dev/null || true
kill -CONT "${pid[lifter]}"
check "slept meanwhile: the history was gone (410)" soon 20 heard '(services|endpointslices|nodes|servicecidrs): 410, its history is gone'
check "slept meanwhile: it listed anew, as a stream" soon 20 heard 'services: streaming'
check "slept meanwhile: what there is is served" both tcp 10.43.0.90 80 "$client4"
traffic_off
check "all the while: no connection failed" same "$(cat "$dir/broken")" ""

echo "# the API server comes back with nothing, then with a backup"
traffic_on
counts >"$dir/counts" &
counting=$!
listen
stop kube-controller-manager
stop kube-apiserver KILL
stop etcd
mv "$dir/etcd" "$dir/etcd.backup"
etcd
api_server
soon 60 kubectl get --raw /api/v1/services >/dev/null
listed=$(now)
check "rule 2: nothing in etcd: all is gone" soon 90 status_is '[.services[] | select(.name != "kubernetes")] == []'
sleep 1 # somebody asks after that, too
traffic_off
wait "$counting" || true
check "rule 2: nothing in etcd: we were told so by complete lists" eval 'heard "services: following" && heard "endpointslices: following"'
check "rule 2: nothing in etcd: all went at once" same "$(awk 'NR == 1 || $1 > 1' "$dir/counts" | wc -l)" 1
first=$(head -n 1 "$dir/broken" | cut -d' ' -f1)
check "rule 2: nothing in etcd: traffic went on until there were lists" test "${first:-0}" -gt $((listed - 500))
check "and then nobody answers" unanswered 10.43.0.80
stop kube-apiserver KILL
stop etcd
rm -r "$dir/etcd"
mv "$dir/etcd.backup" "$dir/etcd"
etcd
api_server
check "the backup is back: both pods answer" soon 90 both tcp 10.43.0.80 80 "$client4"
check "the backup is back: all services are there" soon 10 status_is '[.services[].name] | unique == ["chosen", "far", "hollow", "kubernetes", "late", "mirrored", "only-b", "web"]'
