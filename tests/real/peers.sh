#!/bin/bash
# SPDX-License-Identifier: MIT
#
# peers.sh GROUP: build the real programs that the tests talk to, and print the
# directory that holds them. Progress goes to stderr.
#
#   cluster   kube-apiserver kube-controller-manager kube-proxy kubectl etcd
#   tailnet   headscale tailscaled (called as `tailscale` it is the client too)
#
# They are ordinary Go modules by version, fetched by the go command through
# whatever GOPROXY this machine has. Built once, kept by content (versions, tags,
# Go's own version, architecture) under ${XDG_CACHE_HOME:-~/.cache}/tail_lifter.
# Cold: about a quarter of an hour per group on two busy cores. Warm: nothing.
#
# A machine without Go, or with one from before 1.21 that cannot fetch a newer
# one by itself (Debian 12), gets Go's toolchain as the module that it is.

set -euo pipefail

KUBERNETES=v1.36.3
ETCD=v3.6.8	 # what that Kubernetes is tested with
HEADSCALE=v0.28.0
TAILSCALE=v1.94.1 # what that headscale is built with: compiled once for both
GO=1.26.0	 # the least that all of them ask for

# What tailscaled would only use to talk to the outside, or to clouds we do not have.
OMIT=aws,captiveportal,clientupdate,cloud,drive,kube,logtail,netlog,oauthkey,portmapper,ssh,syspolicy,systray,tap,tpm,webclient

cache=${XDG_CACHE_HOME:-$HOME/.cache}/tail_lifter
say() { echo "peers: $*" >&2; }
die() { say "$*"; exit 1; }

### a Go that is new enough, or one that knows how to become it

newer() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | tail -1)" = "$1" ]; } # $1 >= $2

find_go() {
	local have arch module
	export GOTOOLCHAIN=${GOTOOLCHAIN:-auto}
	PATH=$PATH:/usr/local/go/bin
	command -v go >/dev/null || {
		say "installing Go from the distribution"
		{ apt-get update && apt-get install -y --no-install-recommends golang-go ca-certificates; } >&2 || die "no Go here, and apt has none: install Go"
	}
	have=$(GOTOOLCHAIN=local go env GOVERSION)
	newer "${have#go}" 1.21 && return
	arch=$(go env GOARCH)
	module=golang.org/toolchain@v0.0.1-go$GO.linux-$arch
	say "Go here is $have: fetching $GO"
	(cd / && GO111MODULE=on GOFLAGS=-modcacherw go mod download "$module") >&2 || die "cannot fetch $module"
	GOROOT=$(go env GOMODCACHE)/$module
	chmod +x "$GOROOT"/bin/* "$GOROOT"/pkg/tool/*/*
	export GOROOT PATH=$GOROOT/bin:$PATH
}

### one group: the module that asks for it, and what to build

# The path of a file inside a module, at the version that it has.
module_dir() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p'; }

# Kubernetes names its own parts by v0.0.0 and replaces them by folders, which
# only counts in its own tree: from outside each part is asked for by version.
group_cluster() {
	packages="k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager
		k8s.io/kubernetes/cmd/kube-proxy k8s.io/kubernetes/cmd/kubectl go.etcd.io/etcd/server/v3"
	tags=
	sums=k8s.io/kubernetes@$KUBERNETES
	requires() {
		echo "k8s.io/kubernetes $KUBERNETES"
		echo "go.etcd.io/etcd/server/v3 $ETCD"
		sed -n "s|^\t\(k8s\.io/[^ ]*\) v0\.0\.0\( //.*\)\{0,1\}$|\1 v0${KUBERNETES#v1}|p" "$1/go.mod"
	}
	finish() { mv server etcd; }
}

group_tailnet() {
	packages="github.com/juanfont/headscale/cmd/headscale tailscale.com/cmd/tailscaled"
	tags=ts_include_cli,ts_omit_${OMIT//,/,ts_omit_}
	sums=github.com/juanfont/headscale@$HEADSCALE
	requires() {
		echo "github.com/juanfont/headscale $HEADSCALE"
		echo "tailscale.com $TAILSCALE"
	}
	finish() { ln -s tailscaled tailscale; }
}

build() {
	local out=$1 log source start=$SECONDS
	work=$(mktemp -d) # not local: the trap needs it
	trap 'rm -rf "$work"' EXIT
	log=$cache/peers/$group.log
	source=$(module_dir "$sums")
	[ -d "$source" ] || die "cannot fetch $sums"
	{ printf 'module peers\n\ngo %s\n\nrequire (\n' "$GO"; requires "$source"; echo ')'; } >"$work/go.mod"
	install -m 644 "$source/go.sum" "$work/go.sum" # its authors' own checksums
	mkdir "$work/bin"
	say "building $group (log: $log)"
	# shellcheck disable=SC2086 # packages is a list
	(cd "$work" && CGO_ENABLED=0 GOFLAGS=-mod=mod nice -n 10 \
		go build -trimpath -buildvcs=false -ldflags '-s -w' -tags "$tags" -o bin/ $packages) >"$log" 2>&1 ||
		{ tail -20 "$log" >&2; die "$group does not build"; }
	(cd "$work/bin" && finish)
	mv "$work/bin" "$out.new" && mv -T "$out.new" "$out"
	say "$group built in $((SECONDS - start)) s"
}

group=${1:-}
case $group in cluster | tailnet) ;; *) die "usage: peers.sh cluster|tailnet" ;; esac
find_go
"group_$group"
mkdir -p "$cache/peers"
key=$({ declare -f "group_$group"; echo "$KUBERNETES $ETCD $HEADSCALE $TAILSCALE $tags"; go env GOVERSION GOARCH; } | sha256sum | cut -c1-12)
out=$cache/peers/$group-$key
exec 9>"$cache/peers/$group.lock"
flock 9
[ -d "$out" ] || build "$out"
echo "$out"
