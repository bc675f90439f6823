#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# build.sh: everything a person types. `./build.sh help` lists it.
#
# The road of a build, which is also the order of this file:
#
#   packages    compilers and tools, installed if missing (root) or asked for
#   sources     musl, elfutils, libbpf, mbedTLS: the distribution's source
#               packages, fetched and verified by apt                            -> cache
#   libraries   the same compiled, once per architecture                         -> cache
#   bpf         tail_lifter.bpf.c as an object, inside a C header (skeleton)     -> build/
#   agent       tail_lifter.c + skeleton + libraries: one static file            -> ./tail_lifter
#
# The cache is ${XDG_CACHE_HOME:-~/.cache}/tail_lifter. A directory's name there is
# the hash of all it was made of (recipe, versions, compiler), it appears by one
# rename when it is whole, and it may be deleted at any time. With it a build needs
# no network; `./build.sh update` looks for newer sources.
#
# Environment: V=1 shows every command; JOBS=n compiles n files at once; ARCH=aarch64
# makes `build`, `image` and `cc` work for another architecture; BUDGET=n is another budget.
# A verb is a function verb_NAME with its line of help behind the brace.

# shellcheck disable=SC2086,SC2046,SC2016,SC1003 # flags are words
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
cd "$(dirname "${BASH_SOURCE[0]}")"

SUITE=trixie # the Debian release whose sources are taken, on whatever release we build
BUDGET=${BUDGET:-$((640 << 10))} # bytes: ./tail_lifter must not be larger
IMAGE=docker.io/library/tail-lifter:latest # what Kubernetes takes `tail-lifter:latest` in k3s/ for
JOBS=${JOBS:-$(nproc)}
CACHE=${XDG_CACHE_HOME:-${HOME:-$PWD/build}/.cache}/tail_lifter
ARCHES="x86_64 aarch64 armv7"
case $(uname -m) in
armv7* | armv8l) NATIVE=armv7 ;;
*) NATIVE=$(uname -m) ;;
esac

# === saying things =========================================================

step() { printf '%-9s %s\n' "$1" "$2"; }

die() {
	printf 'build.sh: %s\n' "$*" >&2
	exit 1
}

# Run a command; its output is shown only if it fails, or with V=1.
run() {
	local out status=0
	if [ -n "${V:-}" ]; then
		printf '+ %s\n' "${*@Q}" >&2
		"$@"
		return
	fi
	out=$("$@" 2>&1) || status=$?
	[ $status = 0 ] || { printf '%s\n' "$out" "failed: $*" | tail -n 60 >&2; }
	return $status
}

hash() { sha256sum | cut -c 1-12; }

# The text of functions: what is built by them is built anew when they change.
recipe() { declare -f "$@"; }

# scratch DIR: sets TMP to a new directory in DIR, gone when we are.
SCRATCH=()
trap 'rm -rf "${SCRATCH[@]}"' EXIT
scratch() {
	mkdir -p "$1"
	TMP=$(mktemp -d "$1/tmp.XXXXXX")
	SCRATCH+=("$TMP")
	chmod 755 "$TMP"
}

# One writer at a time; readers need no lock, directories appear whole.
lock_cache() {
	mkdir -p "$CACHE" || die "cannot write to $CACHE: set XDG_CACHE_HOME to a directory you can write to"
	exec {LOCK}>"$CACHE/lock"
	flock "$LOCK"
}
unlock_cache() { exec {LOCK}>&-; }

# === packages ==============================================================

apt_updated=
apt_update() {
	[ -z "$apt_updated" ] || return 0
	run apt-get -qq update || true # one repository of many may be down; what we want will tell
	apt_updated=1
}

# need THING:PACKAGE...: THING is a command or a file that tells whether PACKAGE is there.
# Installs what is missing.
need() {
	local pair thing missing=()
	for pair in "$@"; do
		thing=${pair%:*}
		[[ $thing == /* && -e $thing ]] || command -v "$thing" >/dev/null || missing+=("${pair##*:}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	[ "$(id -u)" = 0 ] || die "packages are missing; as root: apt-get install ${missing[*]}"
	step packages "${missing[*]}"
	apt_update
	DEBIAN_FRONTEND=noninteractive run apt-get -qq install -y --no-install-recommends "${missing[@]}" ||
		die "apt could not install ${missing[*]}"
}

# packages ARCH: what a build for ARCH needs of this machine.
packages() {
	local want=(make:make dpkg-source:dpkg-dev /usr/include/jsmn.h:libjsmn-dev
		"$CLANG:clang" "$LLD:lld" bpftool:bpftool)
	case $1 in
	"$NATIVE") want+=("$CC:gcc" /usr/include/linux/types.h:linux-libc-dev) ;;
	host) want+=("$CC:gcc" /usr/include/stdio.h:libc6-dev) ;;
	*) want+=("$CC:gcc-${TRIPLE//_/-}" "/usr/$TRIPLE/include/linux/types.h:libc6-dev-$(debian_arch "$1")-cross") ;;
	esac
	need "${want[@]}"
}

# === sources ===============================================================

# Where this system gets Debian from, as apt understands its own configuration:
# lines "URI LABEL", for the release itself and for its security updates.
mirrors() {
	apt-get indextargets --format '$(REPO_URI) $(LABEL)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
		awk '($2 == "Debian" || $2 == "Debian-Security") && !seen[$0]++'
}

# private_apt DIR [ARCHES SUITES]: an apt of our own; the system's stays as it is. It sees
# only the sources of SUITE, or the packages of SUITES for ARCHES (Debian's words).
private_apt() {
	local dir=$1 arches=${2:-} suites=${3:-$SUITE} uri label suite key=/usr/share/keyrings/debian-archive-keyring.gpg
	mkdir -p "$dir/lists/partial" "$dir/archives/partial"
	: >"$dir/status" # nothing is installed
	while read -r uri label; do
		for suite in $suites; do
			[ "$label" = Debian ] || suite=$suite-security
			[ $suite = sid-security ] || printf '%s %s%s %s main\n' "$([ -n "$arches" ] && echo deb || echo deb-src)" \
				"$([ -e $key ] && echo "[signed-by=$key] ")" "$uri" "$suite"
		done
	done < <(mirrors) >"$dir/sources.list"
	[ -s "$dir/sources.list" ] || return 1
	cat >"$dir/apt.conf" <<-END
		Dir::Etc::SourceList "$dir/sources.list";
		Dir::Etc::SourceParts "-";
		Dir::State::Lists "$dir/lists";
		Dir::State::Status "$dir/status";
		Dir::Cache "$dir";
		APT::Sandbox::User "";
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		${arches:+APT::Architectures { ${arches// /; }; \};}
	END
}

# The newest version of a source package that can be had. A superseded version
# leaves the mirrors and a new one may not have reached ours yet, so try in order.
fetch_source() {
	local package=$1 version
	for version in $(apt-cache showsrc --only-source "$package" |
		sed -n 's/^Version: //p' | sort -Vru); do
		if apt-get -qq source --download-only --only-source "$package=$version" >fetch.log 2>&1; then
			echo "$version"
			return
		fi
	done
	cat fetch.log >&2
	return 1
}

# fetch_sources: fill the current directory: one folder per package and VERSIONS.
fetch_sources() {
	local package version
	private_apt "$PWD/apt" || {
		[ "$(id -u)" = 0 ] || die "apt knows no Debian mirror; as root: apt-get update"
		apt_update
		private_apt "$PWD/apt" || die "apt knows no Debian mirror: this needs Debian 12 or 13 with its usual sources"
	}
	export APT_CONFIG=$PWD/apt/apt.conf
	run apt-get -qq update || die "apt could not read the list of $SUITE's sources"
	for package in musl elfutils libbpf mbedtls; do
		version=$(fetch_source $package) || die "apt could not fetch the source of $package"
		case $package in
		libbpf) dpkg --compare-versions "$version" ge 1.5 || die "libbpf $version is too old: 1.5 is needed" ;;
		mbedtls) [[ $version == 3.6.* ]] || die "mbedTLS $version: 3.6 is needed" ;;
		esac
		run dpkg-source -x ${package}_*.dsc $package || die "cannot unpack the source of $package"
		echo "$package $version" >>VERSIONS
	done
	unset APT_CONFIG
	mkdir jsmn
	cp /usr/include/jsmn.h jsmn/
	echo "jsmn $(dpkg-query -W -f '${Version}' libjsmn-dev)" >>VERSIONS
	# Only what is compiled, and the licences, stay.
	rm -rf apt ./*.tar.* ./*.dsc fetch.log elfutils/tests mbedtls/tests mbedtls/programs mbedtls/docs
}

# Sets SRC. Newest first: an update leaves the older ones for builds under way.
sources() {
	local key final
	key=src-$({ recipe fetch_sources fetch_source && echo $SUITE; } | hash)
	if [ -z "${1:-}" ]; then
		SRC=$(find "$CACHE" -maxdepth 1 -name "$key-*" -printf '%T@ %p\n' 2>/dev/null | sort -rn | sed -n '1s/^[^ ]* //p')
		[ -z "$SRC" ] || return 0
	fi
	scratch "$CACHE"
	step sources "from Debian $SUITE, by apt"
	(cd "$TMP" && fetch_sources)
	SRC=$CACHE/$key-$(hash <"$TMP/VERSIONS")
	[ -d "$SRC" ] || mv "$TMP" "$SRC"
	touch "$SRC"
}

# === libraries =============================================================

# Sets TRIPLE, CC and ARCH_FLAGS for an architecture; `host` is this machine's
# with glibc, for sanitizers.
toolchain() {
	case $1 in
	x86_64) TRIPLE=x86_64-linux-gnu ARCH_FLAGS="-maes -mpclmul" ;; # as a whole: mbedTLS asks the CPU before it uses them
	aarch64) TRIPLE=aarch64-linux-gnu ARCH_FLAGS= ;;
	armv7) TRIPLE=arm-linux-gnueabihf ARCH_FLAGS= ;;
	host) toolchain "$NATIVE" && return ;;
	*) die "unknown architecture $1: one of $ARCHES" ;;
	esac
	CC=$TRIPLE-gcc
}

debian_arch() {
	case $1 in
	x86_64) echo amd64 ;;
	aarch64) echo arm64 ;;
	armv7) echo armhf ;;
	esac
}

# The plain name of an LLVM tool if it is there, else its newest one with a number.
newest() {
	local tool
	for tool in "$1" "$1"-{22..14} "$1"; do
		! command -v "$tool" >/dev/null || break
	done
	echo "$tool"
}

# What every object is compiled with. Small before fast: -O2 would add 100 kB; where it pays
# tail_lifter.c asks for it itself.
C_FLAGS="-Os -g0 -fPIC -DNDEBUG -ffunction-sections -fdata-sections \
-fno-asynchronous-unwind-tables -fno-unwind-tables \
-fstack-protector-strong -fstack-clash-protection"

# compile OBJECT_DIR FLAGS... -- FILE.c...: several at a time, objects by base name.
compile() {
	local dir=$1 flags=()
	shift
	while [ "$1" != -- ]; do flags+=("$1") && shift; done
	shift
	mkdir -p "$dir"
	(cd "$dir" && printf '%s\0' "$@" | run xargs -0 -n 6 -P "$JOBS" $CC "${flags[@]}" -c)
}

archive() {
	rm -f "$1"
	run $TRIPLE-ar rcsD "$1" "$2"/*.o
}

# The kernel's headers as the compiler finds them, overlaid by libbpf's newer
# ones (Debian 12's know nothing of tcx), and libbpf's own: all that a BPF
# program may include. Named kernel/ so that no C library is in sight.
build_kernel_headers() {
	local header file
	mkdir -p "$LIB/kernel/bpf"
	for header in linux asm asm-generic; do
		file=$(echo "#include <$header/types.h>" | $CC -E -M - | tr -s ' \\' '\n' | grep "/$header/types.h$" | head -n 1)
		cp -rL "${file%/types.h}" "$LIB/kernel/"
	done
	cp -r "$SRC"/libbpf/include/uapi/linux "$LIB/kernel/"
	cp "$SRC"/libbpf/src/{bpf,btf,libbpf,libbpf_common,libbpf_legacy,libbpf_version}.h \
		"$SRC"/libbpf/src/{bpf_helpers,bpf_helper_defs,bpf_endian,bpf_tracing,bpf_core_read}.h "$LIB/kernel/bpf/"
}

build_musl() {
	mkdir -p "$OBJ/musl"
	cd "$OBJ/musl"
	CC=$CC CFLAGS="$C_FLAGS -ffile-prefix-map=$SRC/=" run "$SRC/musl/configure" --target=$TRIPLE --prefix="$LIB" \
		--syslibdir="$LIB/lib" --disable-shared --enable-wrapper=no --enable-optimize=size
	run make -j "$JOBS"
	run make install
}

# libelf, without its configure, which wishes for parts of glibc that libelf never uses.
build_libelf() {
	local files
	mkdir -p "$OBJ/libelf"
	no_zlib >"$LIB/include/zlib.h"
	cat >"$OBJ/libelf/config.h" <<-END
		#define HAVE_ERR_H 1
		#define HAVE_VISIBILITY 1
		#define HAVE_FALLTHROUGH 1
		#define HAVE_MREMAP 1
		#define HAVE_DECL_MEMRCHR 1
		#define HAVE_DECL_MEMPCPY 1
		#define HAVE_DECL_REALLOCARRAY 1
		#define HAVE_DECL_RAWMEMCHR 0
		#define HAVE_DECL_POWEROF2 0
		#include <eu-config.h>
	END
	mapfile -t files < <(sed -n '/^libelf_a_SOURCES/,/[^\\]$/p' "$SRC/elfutils/libelf/Makefile.am" |
		grep -o '[a-z0-9_]*\.c' | sed "s|^|$SRC/elfutils/libelf/|")
	compile "$OBJ/libelf" $FLAGS -std=gnu99 -D_GNU_SOURCE -DHAVE_CONFIG_H -w -I"$OBJ/libelf" -I"$SRC/elfutils/lib" \
		-I"$SRC/elfutils/libelf" -I"$LIB/include" -- "${files[@]}" "$SRC"/elfutils/lib/{next_prime,eu-search}.c
	archive "$LIB/lib/libelf.a" "$OBJ/libelf"
	cp "$SRC"/elfutils/libelf/{libelf,gelf,elf}.h "$LIB/include/"
}

# libelf and libbpf name zlib, for compressed ELF sections and /proc/config.gz. Ours never
# need either, so they get one that always fails, and 40 kB stay out.
no_zlib() {
	cat <<-'END'
		/* Written by build.sh. */
		typedef struct {
			void *zalloc, *zfree, *opaque, *next_in, *next_out;
			unsigned avail_in, avail_out;
		} z_stream;
		typedef void Bytef, *gzFile;
		enum { Z_NULL, Z_OK = 0, Z_NO_FLUSH = 0, Z_STREAM_END, Z_FINISH = 4, Z_BEST_COMPRESSION = 9,
		       Z_STREAM_ERROR = -2, Z_DATA_ERROR = -3 };
		#define deflateInit(s, level) Z_STREAM_ERROR
		#define deflate(s, flush) Z_STREAM_ERROR
		#define deflateEnd(s) Z_STREAM_ERROR
		#define inflateInit(s) Z_STREAM_ERROR
		#define inflate(s, flush) Z_STREAM_ERROR
		#define inflateReset(s) Z_STREAM_ERROR
		#define inflateEnd(s) Z_STREAM_ERROR
		#define gzopen(path, mode) ((gzFile)0)
		#define gzgets(file, line, size) ((char *)0)
		#define gzclose(file) Z_STREAM_ERROR
	END
}

# Of libbpf, what our object has no use for (CO-RE relocations, user-space probes, light
# skeletons) is never called but by name linked in: functions that fail take its place, and
# 26 kB stay out.
build_libbpf() {
	local part unused="usdt gen_loader relo_core btf_relocate"
	compile "$OBJ/libbpf" $FLAGS -w -D_LARGEFILE64_SOURCE -D_FILE_OFFSET_BITS=64 \
		-I"$SRC/libbpf/include" -I"$SRC/libbpf/include/uapi" -I"$LIB/include" -- "$SRC"/libbpf/src/*.c
	for part in $unused; do
		$TRIPLE-nm -g --defined-only "$OBJ/libbpf/$part.o" | sed 's/.* \(.*\)/int \1(void) { return -95; } \/* ENOTSUP *\//' >"$OBJ/$part.c"
		compile "$OBJ/libbpf" $FLAGS -w -- "$OBJ/$part.c"
	done
	archive "$LIB/lib/libbpf.a" "$OBJ/libbpf"
}

# What of mbedTLS we want: a TLS client with certificates, nothing else.
mbedtls_config() {
	cat <<-'END'
		/* Written by build.sh. */
		#define MBEDTLS_PLATFORM_C
		#define MBEDTLS_HAVE_ASM
		#define MBEDTLS_HAVE_TIME
		#define MBEDTLS_HAVE_TIME_DATE

		/* TLS 1.2 and 1.3, client, ECDHE with a certificate. A server may
		 * send records of 16 kB; ours are requests, and one chain of client
		 * certificates, which mbedTLS does not split. Tickets are
		 * ignored when they come: we keep connections, not sessions. */
		#define MBEDTLS_SSL_TLS_C
		#define MBEDTLS_SSL_CLI_C
		#define MBEDTLS_SSL_PROTO_TLS1_2
		#define MBEDTLS_SSL_PROTO_TLS1_3
		#define MBEDTLS_SSL_TLS1_3_COMPATIBILITY_MODE
		#define MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_EPHEMERAL_ENABLED
		#define MBEDTLS_KEY_EXCHANGE_ECDHE_RSA_ENABLED
		#define MBEDTLS_KEY_EXCHANGE_ECDHE_ECDSA_ENABLED
		#define MBEDTLS_SSL_SERVER_NAME_INDICATION
		#define MBEDTLS_SSL_ALPN
		#define MBEDTLS_SSL_EXTENDED_MASTER_SECRET
		#define MBEDTLS_SSL_ALL_ALERT_MESSAGES
		#define MBEDTLS_SSL_KEEP_PEER_CERTIFICATE /* TLS 1.3 demands it */
		#define MBEDTLS_SSL_IN_CONTENT_LEN 16384
		#define MBEDTLS_SSL_OUT_CONTENT_LEN 8192

		/* Certificates and keys, from memory: PEM of PKCS8, SEC1, PKCS1. */
		#define MBEDTLS_X509_USE_C
		#define MBEDTLS_X509_CRT_PARSE_C
		#define MBEDTLS_X509_RSASSA_PSS_SUPPORT
		#define MBEDTLS_PEM_PARSE_C
		#define MBEDTLS_BASE64_C
		#define MBEDTLS_ASN1_PARSE_C
		#define MBEDTLS_ASN1_WRITE_C
		#define MBEDTLS_OID_C
		#define MBEDTLS_PK_C
		#define MBEDTLS_PK_PARSE_C
		#define MBEDTLS_RSA_C
		#define MBEDTLS_PKCS1_V15
		#define MBEDTLS_PKCS1_V21
		#define MBEDTLS_BIGNUM_C
		#define MBEDTLS_ECP_C
		#define MBEDTLS_ECDH_C
		#define MBEDTLS_ECDSA_C
		#define MBEDTLS_ECP_DP_SECP256R1_ENABLED
		#define MBEDTLS_ECP_DP_SECP384R1_ENABLED
		#define MBEDTLS_ECP_NIST_OPTIM /* 20 kB that make a handshake 5 ms instead of 23 */

		/* Ciphers and hashes, by the CPU's instructions where it has them. */
		#define MBEDTLS_CIPHER_C
		#define MBEDTLS_AES_C
		#define MBEDTLS_GCM_C
		#define MBEDTLS_BLOCK_CIPHER_NO_DECRYPT
		#define MBEDTLS_CHACHA20_C
		#define MBEDTLS_POLY1305_C
		#define MBEDTLS_CHACHAPOLY_C
		#define MBEDTLS_MD_C
		#define MBEDTLS_SHA224_C
		#define MBEDTLS_SHA256_C
		#define MBEDTLS_SHA384_C
		#define MBEDTLS_SHA512_C
		#define MBEDTLS_HKDF_C
		#if defined(__x86_64__)
		#define MBEDTLS_AESNI_C
		#elif defined(__aarch64__)
		#define MBEDTLS_AESCE_C
		#define MBEDTLS_SHA256_USE_ARMV8_A_CRYPTO_IF_PRESENT
		#endif

		/* Randomness: only mbedtls_hardware_poll(), which the agent provides. */
		#define MBEDTLS_ENTROPY_C
		#define MBEDTLS_CTR_DRBG_C
		#define MBEDTLS_NO_PLATFORM_ENTROPY
		#define MBEDTLS_ENTROPY_HARDWARE_ALT

		#define MBEDTLS_PSA_CRYPTO_C /* TLS 1.3 is written on it */
	END
}

build_mbedtls() {
	# Not mbedtls_config.h: mbedtls/build_info.h would find the one beside itself.
	mbedtls_config >"$LIB/include/tls_config.h"
	cp -r "$SRC"/mbedtls/include/{mbedtls,psa} "$LIB/include/"
	compile "$OBJ/mbedtls" $FLAGS -w -I"$LIB/include" -I"$SRC/mbedtls/library" "$TLS_CONFIG" -- "$SRC"/mbedtls/library/*.c
	# every byte of a list goes through these: twice as fast for 1 kB
	compile "$OBJ/mbedtls" $FLAGS -O2 -w -I"$LIB/include" -I"$SRC/mbedtls/library" "$TLS_CONFIG" -- "$SRC"/mbedtls/library/{chacha20,poly1305}.c
	archive "$LIB/lib/libmbedtls.a" "$OBJ/mbedtls"
}
TLS_CONFIG='-DMBEDTLS_CONFIG_FILE="tls_config.h"'

# build_libraries ARCH: everything into LIB, objects in OBJ.
build_libraries() {
	local part
	mkdir -p "$LIB/include" "$LIB/lib" "$OBJ"
	FLAGS="$C_FLAGS $ARCH_FLAGS -ffile-prefix-map=$SRC/="
	build_kernel_headers
	if [ "$1" != host ]; then
		step "$1" "musl $(version musl)"
		(build_musl)
		FLAGS="$FLAGS $(musl_includes)"
	else
		FLAGS="$FLAGS -isystem $LIB/kernel"
	fi
	for part in libelf:elfutils libbpf:libbpf mbedtls:mbedtls; do
		step "$1" "${part%:*} $(version "${part#*:}")"
		build_${part%:*}
	done
	cp "$SRC/jsmn/jsmn.h" "$LIB/include/"
}

version() { sed -n "s/^$1 //p" "$SRC/VERSIONS"; }
versions() { paste -sd , "$SRC/VERSIONS" | sed 's/,/, /g'; }

# Compiling against musl: its headers, the kernel's and the compiler's, no others.
musl_includes() {
	echo "-nostdinc -isystem $LIB/include -isystem $LIB/kernel -isystem $($CC -print-file-name=include)"
}

# libraries ARCH: sets LIB, and what `toolchain` sets.
libraries() {
	local arch=$1 key final
	toolchain "$arch"
	CLANG=$(newest clang) LLD=$(newest ld.lld)
	packages "$arch"
	lock_cache
	sources
	key=$({
		recipe $(declare -F | sed -n 's/^declare -f \(build_.*\)/\1/p') mbedtls_config no_zlib toolchain musl_includes compile
		echo "$C_FLAGS $ARCH_FLAGS $SRC"
		$CC -v 2>&1
		$TRIPLE-ld -v
		echo '#include <linux/version.h>' | $CC -E -dM - | grep LINUX_VERSION_CODE
	} | hash)
	final=$CACHE/$arch-$key
	if [ ! -d "$final" ]; then
		scratch "$CACHE"
		LIB=$TMP/out OBJ=$TMP/obj
		build_libraries "$arch"
		cp "$SRC/VERSIONS" "$LIB/"
		mv "$LIB" "$final"
	fi
	LIB=$final
	unlock_cache
}

# === bpf ===================================================================

# bpf ARCH: tail_lifter.bpf.c to build/ARCH/tail_lifter.skel.h, if anything it is made of has
# changed. The object goes into the agent as it is, so what only a debugger reads leaves it;
# the code stays the same byte for byte, and 90 kB become 47:
#   - source lines, except a function's first (which the kernel wants) and at calls of our own
#     functions (which LLVM wants)
#   - labels of basic blocks: clang's names for them are not private to the assembler
#   - DWARF, by bpftool
bpf() {
	local dir=build/$1 out key size n=0
	out=$dir/tail_lifter
	key=$({ recipe bpf && cat tail_lifter.bpf.c tail_lifter.h && echo "$LIB" && $CLANG --version; } | hash)
	[ "$(cat "$out.bpf.key" 2>/dev/null)" != "$key" ] || [ ! -e "$out.skel.h" ] || return 0
	scratch "$dir"
	run $CLANG -target bpf -mcpu=v2 -O2 -g -Wall -Wextra -Werror -nostdinc -isystem "$LIB/kernel" \
		-isystem "$($CLANG -print-resource-dir)/include" -ffile-prefix-map="$PWD/=" -fdebug-compilation-dir=. \
		-S -emit-llvm tail_lifter.bpf.c -o "$TMP/lines.ll"
	sed '/^  /{/ call [^(]* @/!s/, !dbg ![0-9]*//}' "$TMP/lines.ll" >"$TMP/bpf.ll"
	run $CLANG -target bpf -mcpu=v2 -O2 -Xclang -disable-llvm-passes -S "$TMP/bpf.ll" -o "$TMP/labels.s"
	sed 's/\bLBB/.LBB/g' "$TMP/labels.s" >"$TMP/bpf.s"
	run $CLANG -target bpf -mcpu=v2 -c "$TMP/bpf.s" -o "$TMP/bpf.o"
	run bpftool gen object "$TMP/tail_lifter.bpf.o" "$TMP/bpf.o"
	bpftool gen skeleton "$TMP/tail_lifter.bpf.o" name tail_lifter >"$TMP/tail_lifter.skel.h"
	mv "$TMP/tail_lifter.bpf.o" "$TMP/tail_lifter.skel.h" "$dir/"
	echo "$key" >"$out.bpf.key"
	for size in $("$TRIPLE-readelf" -SW "$out.bpf.o" | sed -n 's/.* PROGBITS  *[0-9a-f]* [0-9a-f]* \([0-9a-f]*\) 00  *AX .*/\1/p'); do
		n=$((n + 16#$size / 8))
	done
	step "$1" "tail_lifter.bpf.o, $(stat -c %s "$out.bpf.o") bytes, $n instructions"
}

# === agent =================================================================

WARNINGS="-std=gnu11 -Wall -Wextra -Wno-format-truncation -Werror"

# link_static OUT FLAG|FILE...: lld, because it packs relocations (RELR) on every architecture
# and pays for 64 kB pages in addresses, not in bytes: GNU ld makes 723 kB of aarch64 where lld
# makes 637. Called directly: gcc's idea of -static-pie differs between architectures.
link_static() {
	local out=$1 machine=
	shift
	# Debian's gcc does the same: the processor of the Raspberry Pi 3 needs it.
	[ $TRIPLE != aarch64-linux-gnu ] || machine="--fix-cortex-a53-843419 -z max-page-size=65536"
	run $LLD -pie -static --no-dynamic-linker -o "$out" "$LIB/lib/rcrt1.o" "$LIB/lib/crti.o" \
		"$($CC -print-file-name=crtbeginS.o)" "$@" -L"$LIB/lib" -lbpf -lelf -lmbedtls \
		--start-group -lc "$($CC -print-libgcc-file-name)" --end-group \
		"$($CC -print-file-name=crtendS.o)" "$LIB/lib/crtn.o" --gc-sections --icf=all -O2 $machine \
		-z text -z relro -z now -z noexecstack --pack-dyn-relocs=relr --build-id=none
}

# agent ARCH OUT
agent() {
	local arch=$1 out=$2 size
	libraries "$arch"
	bpf "$arch"
	scratch "build/$arch"
	run $CC $C_FLAGS $ARCH_FLAGS $WARNINGS $(musl_includes) "$TLS_CONFIG" -isystem "build/$arch" \
		-ffile-prefix-map="$PWD/=" -c tail_lifter.c -o "$TMP/tail_lifter.o"
	link_static "$TMP/tail_lifter" -s "$TMP/tail_lifter.o"
	check_static "$TMP/tail_lifter"
	size=$(stat -c %s "$TMP/tail_lifter")
	[ "$size" -le "$BUDGET" ] || die "tail_lifter for $arch has $size bytes, over the budget of $BUDGET"
	mv "$TMP/tail_lifter" "$out"
	step "$arch" "$out, $size bytes of $BUDGET, sha256 $(sha256sum <"$out" | cut -d ' ' -f 1)"
}

# A position-independent program that needs nothing from the machine it runs on.
check_static() {
	local elf
	elf=$($TRIPLE-readelf -hldSW "$1")
	grep -q 'Type: *DYN' <<<"$elf" || die "$1 is not position-independent"
	! grep -q INTERP <<<"$elf" || die "$1 wants an interpreter"
	! grep -q NEEDED <<<"$elf" || die "$1 wants shared libraries"
	! grep -q '\.symtab' <<<"$elf" || die "$1 is not stripped"
}

# === verbs =================================================================

verb_build() { # build ./tail_lifter for this machine (the default); ARCH=aarch64: dist/tail_lifter-aarch64
	[ -z "${ARCH:-}" ] || mkdir -p dist
	agent "${ARCH:-$NATIVE}" "${ARCH:+dist/}tail_lifter${ARCH:+-$ARCH}"
}

verb_all() { # build for x86_64, aarch64 and armv7 into dist/, with checksums
	local arch
	mkdir -p dist
	for arch in $ARCHES; do
		agent "$arch" "dist/tail_lifter-$arch"
	done
	(cd dist && sha256sum tail_lifter-* >SHA256SUMS && cat SHA256SUMS)
}

# By buildah, which needs no daemon, in a storage of its own; the same file gives the same image.
verb_image() { # build the container image of it, one file: dist/tail-lifter.tar; ARCH=aarch64: dist/tail-lifter-aarch64.tar; as root
	local out=dist/tail-lifter${ARCH:+-$ARCH}.tar buildah container
	[ "$(id -u)" = 0 ] || die "buildah wants root here (sudo ./build.sh image)"
	need buildah:buildah
	verb_build
	mkdir -p dist
	scratch build
	buildah="buildah --root $PWD/$TMP/storage --runroot $PWD/$TMP/run --storage-driver vfs"
	container=$($buildah from scratch)
	run $buildah copy --chown 0:0 --chmod 755 "$container" "${ARCH:+dist/}tail_lifter${ARCH:+-$ARCH}" /tail_lifter
	run $buildah config $(image_arch "${ARCH:-$NATIVE}") --entrypoint '["/tail_lifter"]' "$container"
	run $buildah commit --timestamp 0 --identity-label=false "$container" "docker-archive:$TMP/image.tar:$IMAGE"
	mv "$TMP/image.tar" "$out"
	step image "$out, $IMAGE, $(stat -c %s "$out") bytes, sha256 $(sha256sum <"$out" | cut -d ' ' -f 1)"
}

# The words of images for an architecture.
image_arch() {
	case $1 in
	x86_64) echo --arch amd64 ;;
	aarch64) echo --arch arm64 ;;
	armv7) echo --arch arm --variant v7 ;;
	esac
}

verb_cc() { # OUT FILE.c [FLAG...]: compile a test like the agent (musl, static), asserts on
	local arch out=${1:?OUT} file=${2:?FILE.c}
	shift 2
	arch=${ARCH:-$NATIVE}
	libraries "$arch"
	bpf "$arch"
	run $CC ${C_FLAGS//-DNDEBUG/} -g -O1 $ARCH_FLAGS $WARNINGS $(musl_includes) "$TLS_CONFIG" -isystem "build/$arch" \
		-I. "$@" -c "$file" -o "$out.o"
	link_static "$out" "$out.o"
	rm -f "$out.o"
}

verb_cc-asan() { # OUT FILE.c [FLAG...]: the same with glibc and the address and undefined sanitizers
	local out=${1:?OUT} file=${2:?FILE.c}
	shift 2
	libraries host
	bpf host
	run $CC -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
		$ARCH_FLAGS $WARNINGS -isystem "$LIB/include" -isystem "$LIB/kernel" "$TLS_CONFIG" -isystem build/host \
		-I. "$@" "$file" -o "$out" -L"$LIB/lib" -lbpf -lelf -lmbedtls
}

# A helper program of the tests, in build/test; its path is in $BUILT.
test_program() { # NAME FILE.c [cc-asan]
	BUILT=$PWD/build/test/$1
	mkdir -p build/test
	[ "$BUILT" -nt "$2" ] && [ "$BUILT" -nt tail_lifter ] && return
	rm -f "$BUILT" # or a test that does not compile would be the one of yesterday
	"verb_${3:-cc}" "$BUILT" "$2"
}

# Prometheus' own judge of metrics, in $PROMTOOL: one file of a package that, installed, would
# start a server.
promtool() {
	PROMTOOL=$CACHE/promtool
	[ ! -e "$PROMTOOL" ] || return 0
	scratch "$CACHE"
	apt_update
	(cd "$TMP" && apt-get -qq -o APT::Sandbox::User= download prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar x ./usr/bin/promtool) ||
		die "apt could not fetch promtool (package prometheus)"
	mv "$TMP/usr/bin/promtool" "$PROMTOOL"
}

# as_root VERB [ARGUMENT...]: begins again with mounts and a bpffs of its own: a machine that has
# none, which the agent would mount and --cleanup unmount, is then like any other.
as_root() {
	[ "$(id -u)" = 0 ] || die "$1 makes network namespaces: run it as root (sudo ./build.sh $1)"
	[ -z "${OWN_MOUNTS:-}" ] || return 0
	OWN_MOUNTS=1 exec unshare --mount -- bash -c 'while umount -l /sys/fs/bpf; do :; done 2>/dev/null
		mount -t bpf bpf /sys/fs/bpf && exec "$@"' - ./build.sh "$@"
}

verb_demo() { # show the main job in namespaces, without a cluster; as root
	as_root demo "$@"
	need ip:iproute2 curl:curl ethtool:ethtool sysctl:procps
	verb_build
	test_program world tests/world.c
	LIFTER=$PWD/tail_lifter WORLD=$BUILT tests/demo
}

# The layers of tests. Each prints what fails and, last, `N passed, N failed`.
layer_unit() {
	test_program unit_data-sanitized tests/unit_data.c cc-asan && "$BUILT" &&
		test_program unit_data tests/unit_data.c && "$BUILT"
}
layer_demo() ( # what it promises is there
	. tests/check.sh
	local said status=0 words
	test_program world tests/world.c
	said=$(LIFTER=$PWD/tail_lifter WORLD=$BUILT tests/demo 2>&1) || status=$?
	check "demo: exit 0" same $status 0
	for words in "pod-a answers 100.64.0.7" "pod-b answers 100.64.0.7" "pod-a answers fd7a::7" "pod-b answers fd7a::7" \
		"agent: running" "service: default/web" "nothing is left" "sudo tail_lifter"; do
		check "demo: says $words" grep -F "$words" <<<"$said"
	done
	finish
)
layer_semantics() { /usr/bin/python3 tests/semantics/run; }
layer_api() {
	test_program follow tests/api/follow.c && test_program follow-sanitized tests/api/follow.c cc-asan &&
		/usr/bin/python3 tests/api/run
}
layer_packet() { /usr/bin/python3 tests/packet/run; }
layer_netns() {
	local world
	promtool && test_program world tests/world.c && world=$BUILT && test_program wire tests/router/wire.c &&
		LIFTER=$PWD/tail_lifter WORLD=$world WIRE=$BUILT PROMTOOL=$PROMTOOL tests/netns
}
layer_router() {
	local world wire neighbour=$PWD/build/test/neighbour.bpf.o
	libraries "$NATIVE"
	run $CLANG -target bpf -mcpu=v2 -O2 -g -Wall -Wextra -Werror -nostdinc -isystem "$LIB/kernel" -isystem "$LIB/include" \
		-isystem "$($CLANG -print-resource-dir)/include" -c tests/router/neighbour.bpf.c -o "$neighbour"
	test_program world tests/world.c && world=$BUILT &&
		test_program wire tests/router/wire.c && wire=$BUILT &&
		test_program neighbour tests/router/neighbour.c || return
	LIFTER=$PWD/tail_lifter WORLD=$world WIRE=$wire NEIGHBOUR=$BUILT NEIGHBOUR_BPF=$neighbour tests/router/run
}
layer_life() {
	test_program world tests/world.c && LIFTER=$PWD/tail_lifter WORLD=$BUILT tests/life
}
layer_ship() {
	need qemu-aarch64:qemu-user readelf:binutils buildah:buildah podman:podman runc:runc debootstrap:debootstrap \
		/lib/systemd/systemd:systemd && tests/ship
}
layer_real() { verb_image && test_program wire tests/router/wire.c && WIRE=$BUILT tests/real/run; }
layer_kernels() { tests/kernels/run; }

# Runs a layer, shows what it says but for its last line, and adds that up. Where nothing
# failed only lines that begin with `kernel`, `router` or `wire` are for everybody.
layer() {
	local log=build/test/$1.log last start=$SECONDS
	step test "$1"
	mkdir -p build/test
	"layer_$1" >"$log" 2>&1 || [ $? = 1 ] || echo "the layer $1 broke off" >>"$log"
	last=$(tail -n 1 "$log")
	[[ $last =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]] || {
		tail -n 40 "$log"
		FAILED=$((FAILED + 1))
		return
	}
	PASSED=$((PASSED + BASH_REMATCH[1])) FAILED=$((FAILED + BASH_REMATCH[2]))
	if [ "${BASH_REMATCH[2]}" = 0 ] && [ -z "${V:-}" ]; then sed -n '/^\(kernel\|router\|wire\) /p' "$log"; else sed '$d' "$log"; fi
	step "" "$last, $((SECONDS - start)) s"
}

verb_test() { # [LAYER...]: unit semantics api packet demo netns router life (the default), ship, real, kernels; as root
	local words one
	as_root test "$@"
	PASSED=0 FAILED=0
	need ip:iproute2 ping:iputils-ping curl:curl ethtool:ethtool sysctl:procps jq:jq tc:iproute2 nft:nftables iptables:iptables openssl:openssl setpriv:util-linux \
		strace:strace bpftool:bpftool /usr/bin/python3:python3 /usr/lib/python3/dist-packages/scapy:python3-scapy
	verb_build
	for words in "${@:-unit semantics api packet demo netns router life}"; do
		for one in $words; do
			declare -F "layer_$one" >/dev/null || die "no such layer of tests: $one"
			layer "$one"
		done
	done
	echo "$PASSED passed, $FAILED failed"
	[ $FAILED = 0 ]
}

verb_mutants() { # [NAME...]: wrong versions of the datapath, and which test finds each (minutes; as root)
	as_root mutants "$@"
	need patch:patch /usr/bin/python3:python3 /usr/lib/python3/dist-packages/scapy:python3-scapy
	verb_build
	tests/mutants/run "$@"
}

# The benchmarks. Their budgets are printed beside what was measured; nothing fails by time.
bench_sync() { tests/bench/sync; }
bench_packet() {
	test_program packet tests/bench/packet.c && PACKET=$BUILT tests/bench/packet
}

bench_life() { # a thousand restarts
	test_program world tests/world.c && LIFTER=$PWD/tail_lifter WORLD=$BUILT ROUNDS=1000 tests/life restarts
}

verb_bench() { # [sync|packet|life]: how fast and how small, beside kube-proxy (an hour; as root)
	local one
	as_root bench "$@"
	need ip:iproute2 curl:curl sysctl:procps jq:jq openssl:openssl unshare:util-linux iptables:iptables nft:nftables \
		bpftool:bpftool ethtool:ethtool ping:iputils-ping /usr/bin/python3:python3
	verb_build
	for one in "${@:-sync packet life}"; do
		for one in $one; do
			declare -F "bench_$one" >/dev/null || die "no such benchmark: $one"
			step bench "$one"
			"bench_$one"
		done
	done
}

verb_deps() { # build only the libraries
	libraries "$NATIVE"
	step libraries "$(versions)"
}

verb_apt() { # DIR ARCHES SUITES: make DIR/apt.conf, an apt that sees only those (tests/kernels)
	private_apt "$@" || die "apt knows no Debian mirror; as root: apt-get update"
}

verb_update() { # look for newer sources of the libraries, then build
	lock_cache
	sources update
	unlock_cache
	step sources "$(versions)"
	verb_build
}

verb_clean() { # remove what was built here; the cache stays
	rm -rf build dist tail_lifter
}

verb_help() { # print this
	echo "usage: ./build.sh [VERB]   V=1 shows commands"
	sed -n 's/^verb_\([a-z-]*\)() { # \(.*\)/\1\t\2/p' build.sh | while IFS=$'\t' read -r verb text; do
		printf '  %-9s %s\n' "$verb" "$text"
	done
}

verb=${1:-build}
case $verb in -h | --help) verb=help ;; esac
declare -F "verb_$verb" >/dev/null || { verb_help >&2; exit 2; }
[ $# = 0 ] || shift
"verb_$verb" "$@"
