// SPDX-License-Identifier: MIT
/* tail_lifter.c: the agent of TailLifter, in one file. Start at main(), at the end.
 *
 * It learns Services, EndpointSlices, ServiceCIDRs and its own Node, resolves them as kube-proxy
 * would, writes the outcome into BPF maps, and keeps the datapath
 * (tail_lifter.bpf.c) attached to the VPN interface. When it goes the datapath
 * stays; --cleanup takes everything away.
 *
 *      API server                                      --from FILE
 *          │ TLS ▸ HTTP ▸ JSON, one object at a time      │
 *          ▼                                              ▼
 *      objects ─▶ model ─▶ resolve ─▶ maps ─▶ svc_map, set_map, net_map, text_map
 *                 (what is dirty)     (the only stage with effects)
 *
 *      rtnetlink ─▶ interfaces ─▶ doors ─▶ tcx links, or cls_bpf where there is no tcx
 *
 *      model ─▶ tailscaled ─▶ what this node advertises (--advertise)
 *
 * Order of the file, which is the order in which things happen:
 *   limits, saying things, basics, options             everybody's
 *   TLS, HTTP, JSON                                     know no Kubernetes
 *   objects, model, resolve, printing, --from           know no kernel
 *   maps, interfaces, doors                             know no API server
 *   kubeconfig, API server, tailscaled, web, loop       time
 *   commands, options, main
 * A stage returns a value and never calls a later one. `grep '^/\* ==='` lists them.
 *
 * One process, one thread, one epoll; nothing blocks, nothing polls. Whatever
 * comes from outside may be wrong: it gets one line and is tried again.
 *
 * Outside interfaces
 *   API      GET /api/v1/services, /apis/discovery.k8s.io/v1/endpointslices,
 *            /api/v1/nodes (own node only), /apis/networking.k8s.io/v1/servicecidrs;
 *            list and watch
 *   files    kubeconfig and what it names; see "kubeconfig"
 *   TCP      --metrics: GET /metrics, /healthz, /readyz
 *   bpffs    the pin directory; see "doors" for what is in it
 *   netlink  RTNLGRP_LINK; clsact and cls_bpf where there is no tcx
 *   socket   tailscaled's, with --advertise, --check and --cleanup; see "tailscaled"
 *   signals  SIGTERM and SIGINT end it, SIGHUP reads --from anew
 *   env      IFACE, KUBECONFIG, NODE_NAME, KUBERNETES_SERVICE_HOST and _PORT; TS_SOCKET,
 *            where tailscaled's socket is not where it always is
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <ctype.h>
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <link.h>
#include <linux/capability.h>
#include <linux/if_link.h>
#include <linux/magic.h>
#include <linux/membarrier.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <mbedtls/base64.h>
#include <mbedtls/entropy.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/psa_util.h>
#include <mbedtls/sha256.h>
#include <mbedtls/ssl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <psa/crypto.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "tail_lifter.h"
#include "tail_lifter.skel.h"

#define TAIL_LIFTER_VERSION "0.1"

/* === limits ===============================================================
 * Every table and buffer that an outsider fills has its bound here. */
#define MAX_OBJECT   (2u << 20) /* bytes of one object's text; etcd refuses larger ones at 1.5 MiB */
#define MAX_DEPTH    64		/* nesting of one object, itself being level 1 */
#define MAX_NAME     253	/* a DNS subdomain, RFC 1123 */
#define MAX_PORTNAME 63		/* a DNS label */
#define MAX_SPREAD   16384	/* of a Service, see object_spread: each is walked through */
#define MAX_MODEL    (128u << 20) /* bytes, see object_cost; 10,000 services with 100,000 endpoints cost 20 MiB */

/* === saying things ========================================================
 * One fact a line, on stderr. A function that fails says why in `why` and
 * returns -1; who called it decides whether that is said, retried or final. */
static int loud = 1;	 /* -q 0, default 1, -v 2 */
static char why[1024]; /* one line, no newline: what was wrong, where, what to do */

__attribute__((format(printf, 1, 2))) static int fail(const char *fmt, ...)
{
	char text[sizeof(why)]; /* apart from `why`, which may be among the arguments */
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	for (char *c = text; *c; c++) /* whatever a server sent stays on one line */
		if ((unsigned char)*c < ' ' || *c == 0x7f)
			*c = '?';
	memcpy(why, text, sizeof(why));
	return -1;
}

/* warn: always said; note: unless -q; debug: only with -v. */
#define warn(...)  say(0, __VA_ARGS__)
#define note(...)  say(1, __VA_ARGS__)
#define debug(...) say(2, __VA_ARGS__)

__attribute__((format(printf, 2, 3))) static void say(int level, const char *fmt, ...)
{
	va_list ap;

	if (level > loud)
		return;
	va_start(ap, fmt);
	fputs("tail_lifter: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
}

/* === basics =============================================================== */
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* Memory: a failed allocation ends the process with one line; the datapath
 * stays, and whoever supervises us starts us again. */
static void *mem(void *old, size_t n)
{
	void *p = realloc(old, n ? n : 1);

	if (!p) {
		warn("out of memory asking for %zu bytes", n);
		_exit(1);
	}
	return p;
}

/* A growable string of bytes; all zero is empty. `at` is always followed by a
 * NUL that does not count in `len` once anything was added. */
struct buf {
	char *at;
	size_t len, cap;
};

static void buf_room(struct buf *b, size_t more)
{
	if (b->len + more + 1 <= b->cap)
		return;
	b->cap = (b->len + more + 1) * 3 / 2 + 64;
	b->at = mem(b->at, b->cap);
}

static void buf_add(struct buf *b, const void *at, size_t n)
{
	buf_room(b, n);
	memcpy(b->at + b->len, at, n);
	b->len += n;
	b->at[b->len] = 0;
}

__attribute__((format(printf, 2, 3))) static void buf_printf(struct buf *b, const char *fmt, ...)
{
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(NULL, 0, fmt, ap);
	va_end(ap);
	buf_room(b, n);
	va_start(ap, fmt);
	vsnprintf(b->at + b->len, n + 1, fmt, ap);
	va_end(ap);
	b->len += n;
}

/* Empties, and gives the memory back if it is more than `keep` bytes. */
static void buf_reset(struct buf *b, size_t keep)
{
	b->len = 0;
	if (b->cap > keep) {
		free(b->at);
		*b = (struct buf){ 0 };
	}
}

static void buf_free(struct buf *b)
{
	buf_reset(b, 0);
}

/* Milliseconds of a clock that never jumps. */
static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* 64 bits of any bytes, chained by `seed`: FNV-1a with MurmurHash3's finish.
 * Not secret: what indexes tables by it compares the whole key. */
static uint64_t hash64(uint64_t seed, const void *at, size_t n)
{
	uint64_t h = seed ^ 0xcbf29ce484222325u;

	for (const unsigned char *c = at; n--; c++)
		h = (h ^ *c) * 0x100000001b3u;
	h = (h ^ h >> 33) * 0xff51afd7ed558ccdu;
	h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53u;
	return h ^ h >> 33;
}

/* The same for what is told apart by the number alone, and chosen by whoever may write objects:
 * the first bytes of its SHA-256. */
static uint64_t number64(const void *at, size_t n)
{
	uint64_t sha[4];

	mbedtls_sha256(at, n, (void *)sha, 0);
	return sha[0];
}

/* Addresses of both families travel as struct in6_addr, IPv4 as ::ffff:a.b.c.d;
 * ports in user space in host byte order. */
static bool addr_is_v4(const struct in6_addr *a)
{
	return IN6_IS_ADDR_V4MAPPED(a);
}

/* "10.0.0.1" (leading zeros are decimal, as kube-proxy's netutils reads them)
 * or any form of RFC 4291 without zone; false if it is neither. An IPv6 text
 * that denotes a v4-mapped address is IPv4, as in Go's net.ParseIP. */
static bool addr_parse(const char *s, size_t n, struct in6_addr *a)
{
	bool v6 = n && memchr(s, ':', n);
	char text[64];
	size_t len = 0;

	*a = (struct in6_addr){ .s6_addr[10] = 0xff, .s6_addr[11] = 0xff };
	if (n >= sizeof(text) || (n && memchr(s, 0, n)))
		return false;
	for (size_t i = 0; i < n; i++) /* all but leading zeros, which inet_pton refuses */
		if (v6 || s[i] != '0' || (len && text[len - 1] != '.') || i + 1 == n ||
		    !isdigit((unsigned char)s[i + 1]))
			text[len++] = s[i];
	text[len] = 0;
	return inet_pton(v6 ? AF_INET6 : AF_INET, text, v6 ? a->s6_addr : a->s6_addr + 12) == 1;
}

/* From the 4 or 16 bytes of an address of that family. */
static void addr_take(struct in6_addr *a, int family, const void *bytes)
{
	*a = (struct in6_addr){ .s6_addr = { [10] = 0xff, [11] = 0xff } };
	memcpy(family == AF_INET ? a->s6_addr + 12 : a->s6_addr, bytes, family == AF_INET ? 4 : 16);
}

/* The text of an address (RFC 5952); `text` has INET6_ADDRSTRLEN bytes and is
 * returned. Not inet_ntop: libraries differ in what they shorten. */
static const char *addr_text(const struct in6_addr *a, char *text)
{
	int best = 8, zeros = 1, n = 0;

	if (addr_is_v4(a))
		return inet_ntop(AF_INET, a->s6_addr + 12, text, INET6_ADDRSTRLEN);
	for (int i = 0, run = 0; i < 8; i++) { /* the first longest run of two and more */
		run = a->s6_addr[i * 2] || a->s6_addr[i * 2 + 1] ? 0 : run + 1;
		if (run > zeros) {
			zeros = run;
			best = i + 1 - run;
		}
	}
	for (int i = 0; i < 8; i++)
		if (i < best || i >= best + zeros)
			n += sprintf(text + n, "%s%x", i && i != best + zeros ? ":" : "",
				     a->s6_addr[i * 2] << 8 | a->s6_addr[i * 2 + 1]);
		else if (i == best)
			n += sprintf(text + n, "::");
	return text;
}

/* For a socket of that family; an IPv4 one takes the last four bytes. Its length. */
static socklen_t addr_socket(struct sockaddr_storage *to, int family, const struct in6_addr *a,
			     uint16_t port)
{
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)to;
	struct sockaddr_in *v4 = (struct sockaddr_in *)to;

	*to = (struct sockaddr_storage){ .ss_family = family };
	v6->sin6_port = htons(port); /* where an IPv4 one has its own */
	if (family == AF_INET)
		memcpy(&v4->sin_addr, a->s6_addr + 12, sizeof(v4->sin_addr));
	else
		v6->sin6_addr = *a;
	return family == AF_INET ? sizeof(*v4) : sizeof(*v6);
}

/* A range of addresses; `bits` counts in the 128 of the mapped form (an IPv4
 * /16 has 112). */
struct cidr {
	struct in6_addr addr;
	int bits; /* so wide, for no gap: two are compared as bytes */
};

/* Clears the bits of `a` behind the first `bits`. */
static void addr_mask(struct in6_addr *a, unsigned bits)
{
	for (unsigned i = 0; i < 16; i++)
		if (bits < i * 8 + 8)
			a->s6_addr[i] &= bits <= i * 8 ? 0 : 0xff << (i * 8 + 8 - bits);
}

static bool cidr_has(const struct cidr *c, const struct in6_addr *a)
{
	struct in6_addr m = *a;

	addr_mask(&m, c->bits);
	return !memcmp(&m, &c->addr, sizeof(m));
}

/* "10.43.0.0/16", "fd43::/112"; host bits stay as they were written. A
 * v4-mapped IPv6 text is refused: its length would be ambiguous. */
static bool cidr_parse(const char *s, size_t n, struct cidr *c)
{
	const char *slash = memchr(s, '/', n), *end = s + n, *digits = slash ? slash + 1 : end;
	unsigned bits = 0, width;

	*c = (struct cidr){ 0 };
	if (digits == end || end - digits > 3 || !addr_parse(s, slash - s, &c->addr))
		return false;
	for (const char *d = digits; d < end; bits = bits * 10 + (*d++ - '0'))
		if (!isdigit((unsigned char)*d))
			return false;
	width = addr_is_v4(&c->addr) ? 32 : 128;
	c->bits = 128 - width + bits;
	return bits <= width && (*digits != '0' || end - digits == 1) &&
		(width == 128 || !memchr(s, ':', n));
}

static bool cidr_overlap(const struct cidr *a, const struct cidr *b)
{
	return a->bits <= b->bits ? cidr_has(a, &b->addr) : cidr_has(b, &a->addr);
}

/* "10.43.0.0/16"; `text` has INET6_ADDRSTRLEN + 4 bytes and is returned. */
static const char *cidr_text(const struct cidr *c, char *text)
{
	addr_text(&c->addr, text);
	sprintf(text + strlen(text), "/%d", addr_is_v4(&c->addr) ? c->bits - 96 : c->bits);
	return text;
}

/* === options (what was asked) ============================================= */
enum snat { SNAT_OFF, SNAT_AUTO, SNAT_ON };

/* --map FROM=TO: TO's ClusterIPs are served at FROM too; same family and length. */
struct map_option {
	struct cidr from, to;
};

static struct options {
	const char *iface;	/* comma-separated names */
	const char *kubeconfig; /* NULL: discover */
	const char *from;	/* NULL: an API server; "-": stdin */
	const char *node;	/* own node's name, never NULL once options are read */
	const char *selector;	/* kubectl -l, NULL or "": all; checked by model_init */
	const char **namespaces;
	int n_namespaces; /* 0: all */
	bool has_vip_range;
	struct cidr vip_range;
	struct map_option *maps;
	int n_maps;
	enum snat snat;
	unsigned flows;
	const char *pin_dir;
	const char *status_of; /* --status NAMESPACE/NAME, or NULL */
	bool json;	       /* -o json */
	bool fast, advertise;
	struct in6_addr metrics; /* where --metrics listens; ::, any address */
	uint16_t metrics_port;	 /* 0: nowhere */
} opt;
/* === TLS ==================================================================
 * One connection to one address, by mbedTLS (1.2 or 1.3) or in the clear, over
 * a socket that never blocks. Knows no HTTP. The server's certificate is always
 * checked: signed by our CA, in force, and made out to the name or address we
 * asked for; nothing here can turn that off. */

/* A certificate or key in PEM, and where it comes from, for the message. */
struct pem {
	struct buf *text;
	char from[256];
};

/* What connections share; it must outlive them. */
struct tls_trust {
	mbedtls_ssl_config conf;
	mbedtls_x509_crt ca, cert;
	mbedtls_pk_context key;
	char ca_from[256];
};

enum tls_state {
	TLS_CLOSED,	/* nothing is held */
	TLS_CONNECTING, /* the kernel's connect() is under way */
	TLS_SHAKING,	/* TLS handshake */
	TLS_OPEN,	/* bytes may flow */
};

struct tls { /* all zero: closed */
	enum tls_state state;
	int fd, error;		 /* the socket and its errno */
	uint32_t want;		 /* EPOLLIN or EPOLLOUT: call again when the socket can */
	struct tls_trust *trust; /* NULL: in the clear */
	mbedtls_ssl_context ssl;
	char name[256]; /* what the certificate must be made out to */
	bool blamed;	/* `why` tells what its certificate lacks */
};

/* mbedTLS seeds itself by this (MBEDTLS_ENTROPY_HARDWARE_ALT): /dev/random,
 * which it would read on musl, may block for ever. */
int mbedtls_hardware_poll(void *data, unsigned char *out, size_t len, size_t *n)
{
	(void)data;
	*n = len < 256 ? len : 256;
	return getentropy(out, *n) ? MBEDTLS_ERR_ENTROPY_SOURCE_FAILED : 0;
}

/* The names and addresses a certificate is made out to: "a.b, 127.0.0.1". */
static void x509_names(const mbedtls_x509_crt *crt, struct buf *out)
{
	for (const mbedtls_x509_sequence *s = &crt->subject_alt_names; s; s = s->next) {
		int type = s->buf.tag & MBEDTLS_ASN1_TAG_VALUE_MASK;
		int family = s->buf.len == 4 ? AF_INET : AF_INET6;
		char ip[INET6_ADDRSTRLEN] = "?";

		buf_printf(out, "%s", out->len ? ", " : "");
		if (type == MBEDTLS_X509_SAN_DNS_NAME)
			buf_add(out, s->buf.p, s->buf.len);
		else if (type == MBEDTLS_X509_SAN_IP_ADDRESS)
			buf_printf(out, "%s", inet_ntop(family, s->buf.p, ip, sizeof(ip)));
	}
}

/* mbedTLS shows each certificate of the server's chain, CA first, with what it
 * finds wrong; the first thing wrong becomes `why`. It changes no verdict. */
static int tls_on_certificate(void *conn, mbedtls_x509_crt *crt, int depth, uint32_t *flags)
{
	const mbedtls_x509_time *from = &crt->valid_from, *to = &crt->valid_to;
	struct tls *t = conn;
	struct buf names = { 0 };
	time_t clock = time(NULL);
	char now[32];

	if (!*flags || t->blamed)
		return 0;
	t->blamed = true;
	strftime(now, sizeof(now), "%Y-%m-%d %H:%M", gmtime(&clock));
	x509_names(crt, &names);
	if (*flags & MBEDTLS_X509_BADCERT_NOT_TRUSTED)
		fail("the server's certificate is not signed by the CA in %s: take this cluster's "
		     "CA", t->trust->ca_from);
	else if (*flags & (MBEDTLS_X509_BADCERT_EXPIRED | MBEDTLS_X509_BADCERT_FUTURE))
		fail("the %s certificate is valid from %d-%02d-%02d to %d-%02d-%02d, but the clock "
		     "here says %s UTC: set the clock, or renew it", depth ? "CA's" : "server's",
		     from->year, from->mon, from->day, to->year, to->mon, to->day, now);
	else if (*flags & MBEDTLS_X509_BADCERT_CN_MISMATCH)
		fail("the server's certificate is for %s, not for %s: use one of these as server "
		     "or tls-server-name", names.len ? names.at : "nobody", t->name);
	else
		fail("the server's certificate is too weak, or none for servers (0x%x)", *flags);
	buf_free(&names);
	return 0;
}

static void tls_trust_free(struct tls_trust *t)
{
	if (!t)
		return;
	mbedtls_ssl_config_free(&t->conf);
	mbedtls_x509_crt_free(&t->ca);
	mbedtls_x509_crt_free(&t->cert);
	mbedtls_pk_free(&t->key);
	free(t);
}

static int tls_parse(struct tls_trust *t, const struct pem *ca, const struct pem *cert,
		     const struct pem *key)
{
	int (*random)(void *, unsigned char *, size_t) = mbedtls_psa_get_random;
	void *state = MBEDTLS_PSA_RANDOM_STATE;

	if (mbedtls_x509_crt_parse(&t->ca, (void *)ca->text->at, ca->text->len + 1) < 0)
		return fail("%s: no CA certificate in PEM form", ca->from);
	if (!cert->text->len && !key->text->len)
		return 0;
	if (!cert->text->len || !key->text->len)
		return fail("%s: a client certificate and its key need each other",
			    cert->text->len ? cert->from : key->from);
	if (mbedtls_x509_crt_parse(&t->cert, (void *)cert->text->at, cert->text->len + 1))
		return fail("%s: no client certificate in PEM form", cert->from);
	if (mbedtls_pk_parse_key(&t->key, (void *)key->text->at, key->text->len + 1, NULL, 0,
				 random, state))
		return fail("%s: no usable client key (RSA or ECDSA in PEM form, not encrypted)",
			    key->from);
	if (mbedtls_pk_check_pair(&t->cert.pk, &t->key, random, state))
		return fail("%s: the key does not belong to the certificate in %s", key->from,
			    cert->from);
	return mbedtls_ssl_conf_own_cert(&t->conf, &t->cert, &t->key);
}

/* CA, client certificate and key (the last two may be empty), checked; NULL with why. */
static struct tls_trust *tls_trust_new(const struct pem *ca, const struct pem *cert,
				       const struct pem *key)
{
	/* PKCS1 before PSS, or mbedTLS 3.6.6 fails with TLS 1.2 servers that have an
	 * RSA certificate and follow our order (Mbed-TLS/mbedtls 10668). */
	static const uint16_t signatures[] = {
		MBEDTLS_TLS1_3_SIG_ECDSA_SECP256R1_SHA256,
		MBEDTLS_TLS1_3_SIG_ECDSA_SECP384R1_SHA384,
		MBEDTLS_TLS1_3_SIG_RSA_PKCS1_SHA256, MBEDTLS_TLS1_3_SIG_RSA_PKCS1_SHA384,
		MBEDTLS_TLS1_3_SIG_RSA_PKCS1_SHA512, MBEDTLS_TLS1_3_SIG_RSA_PSS_RSAE_SHA256,
		MBEDTLS_TLS1_3_SIG_RSA_PSS_RSAE_SHA384, MBEDTLS_TLS1_3_SIG_RSA_PSS_RSAE_SHA512, 0 };
	struct tls_trust *t = memset(mem(NULL, sizeof(*t)), 0, sizeof(*t));

	memcpy(t->ca_from, ca->from, sizeof(t->ca_from));
	mbedtls_ssl_config_init(&t->conf);
	mbedtls_x509_crt_init(&t->ca);
	mbedtls_x509_crt_init(&t->cert);
	mbedtls_pk_init(&t->key);
	fail("mbedTLS does not start");
	if (psa_crypto_init() ||
	    mbedtls_ssl_config_defaults(&t->conf, MBEDTLS_SSL_IS_CLIENT,
					MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT) ||
	    tls_parse(t, ca, cert, key)) {
		tls_trust_free(t);
		return NULL;
	}
	mbedtls_ssl_conf_rng(&t->conf, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
	mbedtls_ssl_conf_authmode(&t->conf, MBEDTLS_SSL_VERIFY_REQUIRED);
	mbedtls_ssl_conf_ca_chain(&t->conf, &t->ca, NULL);
	mbedtls_ssl_conf_sig_algs(&t->conf, signatures);
	return t;
}

static int tls_send(void *conn, const unsigned char *at, size_t n)
{
	struct tls *t = conn;
	ssize_t r = send(t->fd, at, n, MSG_NOSIGNAL);

	t->error = errno;
	if (r < 0)
		return errno == EAGAIN ? MBEDTLS_ERR_SSL_WANT_WRITE : MBEDTLS_ERR_NET_SEND_FAILED;
	return r;
}

static int tls_recv(void *conn, unsigned char *at, size_t n)
{
	struct tls *t = conn;
	ssize_t r = recv(t->fd, at, n, 0);

	t->error = errno;
	if (r < 0)
		return errno == EAGAIN ? MBEDTLS_ERR_SSL_WANT_READ : MBEDTLS_ERR_NET_RECV_FAILED;
	return r;
}

/* mbedTLS's error, or errno behind it, as one line. */
static int tls_explain(struct tls *t, int r)
{
	const unsigned char *head = t->ssl.MBEDTLS_PRIVATE(in_hdr);
	bool shaking = t->state == TLS_SHAKING;
	unsigned char raw[24] = ""; /* what mbedTLS did not come to read */
	int alert = -1;

	if (r == MBEDTLS_ERR_X509_CERT_VERIFY_FAILED && t->blamed)
		return -1; /* `why` stands already */
	if (shaking && recv(t->fd, raw, sizeof(raw) - 1, 0) == 7 && raw[0] == 0x15)
		alert = raw[6];
	else if (shaking && isprint(*head))
		return fail("the server does not speak TLS (it begins with \"%.5s%s\"): is this "
			    "the API server's port, or is http:// meant?", head, raw);
	else if (t->trust && !shaking && r == MBEDTLS_ERR_NET_SEND_FAILED &&
		 mbedtls_ssl_read(&t->ssl, raw, 1) == MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE)
		r = MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE; /* it had said why before it closed */
	if (r == MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE)
		alert = t->ssl.MBEDTLS_PRIVATE(in_msg)[1];
	if (alert >= 0)
		return fail("the server breaks TLS off (alert %d): does it want a client "
			    "certificate, of this cluster and in force? Else it has no version or "
			    "cipher in common with us", alert);
	if (r == MBEDTLS_ERR_NET_RECV_FAILED || r == MBEDTLS_ERR_NET_SEND_FAILED ||
	    r == MBEDTLS_ERR_SSL_CONN_EOF)
		return fail("the connection broke (%s)%s",
			    r == MBEDTLS_ERR_SSL_CONN_EOF ? "closed" : strerror(t->error), !shaking ? "" :
			    " in the TLS handshake: does the server take our client certificate?");
	if (r == MBEDTLS_ERR_SSL_BAD_CERTIFICATE)
		return fail("the server's certificate is not made for servers");
	return fail("TLS failed (mbedTLS -0x%04x)", -r);
}

static int tcp_explain(int error)
{
	return fail("%s: %s", strerror(error), error != ECONNREFUSED ?
		    "check the address and the way to it" :
		    "nothing listens there; does the API server (k3s) run?");
}

static void tls_close(struct tls *t)
{
	if (t->state == TLS_OPEN && t->trust)
		mbedtls_ssl_close_notify(&t->ssl);
	if (t->state != TLS_CLOSED) {
		mbedtls_ssl_free(&t->ssl);
		close(t->fd);
	}
	*t = (struct tls){ 0 };
}

/* Begins a connection (in the clear if `trust` is NULL): 0, or -1 with why.
 * Then wait for t->want on t->fd and call tls_progress. */
static int tls_connect(struct tls *t, struct tls_trust *trust, const struct in6_addr *addr,
		       uint16_t port, const char *name)
{
	static const int options[][3] = { /* a silent death is noticed within 45 s */
		{ IPPROTO_TCP, TCP_NODELAY, 1 }, { SOL_SOCKET, SO_KEEPALIVE, 1 },
		{ IPPROTO_TCP, TCP_KEEPIDLE, 20 }, { IPPROTO_TCP, TCP_KEEPINTVL, 10 },
		{ IPPROTO_TCP, TCP_USER_TIMEOUT, 35000 } };
	int family = addr_is_v4(addr) ? AF_INET : AF_INET6;
	struct sockaddr_storage to;
	socklen_t n = addr_socket(&to, family, addr, port);

	*t = (struct tls){ .state = TLS_CONNECTING, .want = EPOLLOUT, .trust = trust };
	snprintf(t->name, sizeof(t->name), "%s", name);
	mbedtls_ssl_init(&t->ssl);
	t->fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	for (size_t i = 0; i < ARRAY_SIZE(options) && t->fd >= 0; i++)
		setsockopt(t->fd, options[i][0], options[i][1], &options[i][2], sizeof(int));
	if (t->fd < 0 || (connect(t->fd, (struct sockaddr *)&to, n) && errno != EINPROGRESS))
		tcp_explain(errno);
	else if (trust && (mbedtls_ssl_setup(&t->ssl, &trust->conf) ||
			   mbedtls_ssl_set_hostname(&t->ssl, name)))
		fail("mbedTLS does not start a connection to %s", name);
	else {
		mbedtls_ssl_set_bio(&t->ssl, t, tls_send, tls_recv, NULL);
		mbedtls_ssl_set_verify(&t->ssl, tls_on_certificate, t);
		return 0;
	}
	tls_close(t);
	return -1;
}

#define TLS_END (-2)

/* What mbedTLS returned means: bytes, 0 wait for t->want, TLS_END no more will
 * come, -1 with why. */
static ssize_t tls_result(struct tls *t, int r)
{
	t->want = r == MBEDTLS_ERR_SSL_WANT_WRITE ? EPOLLOUT : EPOLLIN;
	if (r == MBEDTLS_ERR_SSL_WANT_WRITE || r == MBEDTLS_ERR_SSL_WANT_READ)
		return 0;
	if (t->state == TLS_OPEN && (r == 0 || r == MBEDTLS_ERR_SSL_CONN_EOF ||
				     r == MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY))
		return TLS_END;
	return r > 0 ? r : tls_explain(t, r);
}

/* Connect and handshake go on: 1 open, 0 wait for t->want, -1 with why. */
static int tls_progress(struct tls *t)
{
	socklen_t n = sizeof(t->error);
	int r = 0;

	if (t->state == TLS_CONNECTING) {
		if (getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &t->error, &n) || t->error)
			return tcp_explain(t->error);
		t->state = TLS_SHAKING;
	}
	r = t->trust ? mbedtls_ssl_handshake(&t->ssl) : 0;
	if (r)
		return tls_result(t, r);
	t->state = TLS_OPEN;
	return 1;
}

/* Writes what it can. After 0 the same bytes must be offered again. */
static ssize_t tls_write(struct tls *t, const char *at, size_t n)
{
	return tls_result(t, t->trust ? mbedtls_ssl_write(&t->ssl, (void *)at, n) :
					tls_send(t, (void *)at, n));
}

/* Reads some. Call until 0: mbedTLS may hold bytes that epoll does not see. */
static ssize_t tls_read(struct tls *t, char *at, size_t n)
{
	int r;

	do
		r = t->trust ? mbedtls_ssl_read(&t->ssl, (void *)at, n) :
			       tls_recv(t, (void *)at, n);
	while (r == MBEDTLS_ERR_SSL_RECEIVED_NEW_SESSION_TICKET);
	return tls_result(t, r);
}

/* Bytes that came already and no event will announce. */
static bool tls_holds(const struct tls *t)
{
	return t->state == TLS_OPEN && t->trust && mbedtls_ssl_check_pending(&t->ssl);
}
/* === HTTP =================================================================
 * The client's half of HTTP/1.1, GET only: a request as text, an answer taken
 * apart as its bytes come, the body handed on where it lies. Knows neither
 * Kubernetes nor where the bytes come from. */
#define MAX_HTTP_LINE 8192  /* one header, or a chunk's size with its extensions */
#define MAX_HTTP_HEAD 32768 /* all headers and trailers of an answer; 1xx before it count too */

enum http_state {
	HTTP_STATUS, /* all zero: an answer is to begin */
	HTTP_HEADERS,
	HTTP_LENGTH,	  /* body: `left` bytes of Content-Length to come */
	HTTP_CHUNK_SIZE,  /* body: the line before a chunk */
	HTTP_CHUNK,	  /* body: `left` bytes of a chunk to come */
	HTTP_CHUNK_END,	  /* body: the line end behind a chunk */
	HTTP_TRAILERS,	  /* body: lines behind the last chunk */
	HTTP_UNTIL_CLOSE, /* body: ends with the connection */
	HTTP_DONE,
};

struct http { /* all zero: before an answer */
	enum http_state state;
	int status;
	bool keeps;	 /* the connection can carry another request */
	long retry_after; /* seconds, 0: not said */
	char type[64], location[256];
	/* inside */
	bool chunked, has_length;
	uint64_t left;
	size_t head; /* bytes of head so far */
	struct buf line;
};

enum http_got { HTTP_MORE, HTTP_HEAD, HTTP_BODY, HTTP_END, HTTP_BAD };

/* Before the next answer. */
static void http_reset(struct http *h)
{
	buf_free(&h->line);
	*h = (struct http){ 0 };
}

/* `host` as in a Host header; no Authorization without a token. */
static void http_get(struct buf *out, const char *host, const char *target, const char *token)
{
	buf_printf(out, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: tail_lifter\r\n"
		   "Accept: application/json\r\n", target, host);
	if (token && *token)
		buf_printf(out, "Authorization: Bearer %s\r\n", token);
	buf_printf(out, "\r\n");
}

static int http_alien(const char *line)
{
	return fail("this is no HTTP/1.1: the answer begins with \"%.20s\"%s", line,
		    *line == 0x15 ? "; is https:// meant?" : "");
}

/* One whole line in h->line, without its end: 1, 0 more is needed, -1 why. */
static int http_line(struct http *h, const char **at, size_t *n)
{
	const char *end = memchr(*at, '\n', *n);
	size_t take = end ? (size_t)(end + 1 - *at) : *n, len;

	h->head += h->state == HTTP_CHUNK_SIZE || h->state == HTTP_CHUNK_END ? 0 : take;
	if (h->line.len + take > MAX_HTTP_LINE || h->head > MAX_HTTP_HEAD)
		return fail("the answer's head is longer than %d bytes, or a line of it than %d",
			    MAX_HTTP_HEAD, MAX_HTTP_LINE);
	buf_add(&h->line, *at, take);
	*at += take;
	*n -= take;
	len = h->line.len;
	if (h->state == HTTP_STATUS && strncmp(h->line.at, "HTTP/1.", len < 7 ? len : 7))
		return http_alien(h->line.at); /* at once, for it may never send a line's end */
	if (!end)
		return 0;
	len -= len > 1 && h->line.at[len - 2] == '\r' ? 2 : 1;
	h->line.at[h->line.len = len] = 0;
	for (size_t i = 0; i < len; i++)
		if (iscntrl((unsigned char)h->line.at[i]) && h->line.at[i] != '\t')
			return fail("a control character in the answer's head: \"%s\"", h->line.at);
	return 1;
}

static int http_header(struct http *h, char *s)
{
	size_t name = strcspn(s, ": \t");
	char *value = s + name + 1, *end = s + strlen(s);

	if (!name || s[name] != ':')
		return fail("no header of HTTP: \"%.40s\"", s);
	s[name] = 0;
	value += strspn(value, " \t");
	while (end > value && (end[-1] == ' ' || end[-1] == '\t'))
		*--end = 0;
	if (!strcasecmp(s, "Content-Length")) {
		uint64_t length = strtoull(value, NULL, 10);

		if (!*value || value[strspn(value, "0123456789")] || strlen(value) > 18 ||
		    (h->has_length && h->left != length))
			return fail("a Content-Length that is none: \"%.40s\"", value);
		h->left = length;
		h->has_length = true;
	} else if (!h->chunked && !strcasecmp(s, "Transfer-Encoding") &&
		   !strcasecmp(value, "chunked")) {
		h->chunked = true;
	} else if (!strcasecmp(s, "Transfer-Encoding") ||
		   (!strcasecmp(s, "Content-Encoding") && strcasecmp(value, "identity"))) {
		return fail("%s \"%.40s\" was not asked for", s, value);
	} else if (!strcasecmp(s, "Connection")) {
		h->keeps = h->keeps && !strcasestr(value, "close");
	} else if (!strcasecmp(s, "Retry-After")) {
		h->retry_after = value[strspn(value, "0123456789")] || strlen(value) > 6 ? 0 : atol(value);
	} else if (!strcasecmp(s, "Content-Type")) {
		snprintf(h->type, sizeof(h->type), "%s", value);
	} else if (!strcasecmp(s, "Location")) {
		snprintf(h->location, sizeof(h->location), "%s", value);
	}
	return 0;
}

/* The head is whole: how does the body come (RFC 9112, 6.3)? */
static int http_framing(struct http *h)
{
	if (h->chunked && h->has_length)
		return fail("the answer has both a Content-Length and chunks");
	if (h->status < 200 && h->status != 101) { /* an interim answer; the real one follows */
		h->state = HTTP_STATUS;
		h->has_length = h->chunked = false;
	} else if (h->status == 101 || h->status == 204 || h->status == 304) {
		h->state = HTTP_DONE; /* these have no body */
	} else {
		h->state = h->chunked ? HTTP_CHUNK_SIZE :
			h->has_length ? HTTP_LENGTH : HTTP_UNTIL_CLOSE;
	}
	return 0;
}

/* h->line is whole: on to the next state. */
static int http_step(struct http *h)
{
	char *s = h->line.at;
	size_t digits = strspn(s, "0123456789abcdefABCDEF");
	int n = 0;

	switch (h->state) {
	case HTTP_STATUS:
		if (sscanf(s, "HTTP/1.%*1[0-9] %3d%n", &h->status, &n) != 1 || n != 12 ||
		    h->status < 100 || (s[12] && s[12] != ' '))
			return http_alien(s);
		h->keeps = s[7] != '0';
		h->state = HTTP_HEADERS;
		return 0;
	case HTTP_HEADERS:
		return *s ? http_header(h, s) : http_framing(h);
	case HTTP_CHUNK_SIZE:
		h->left = strtoull(s, NULL, 16);
		h->state = h->left ? HTTP_CHUNK : HTTP_TRAILERS;
		return !digits || digits > 15 || !memchr("; \t", s[digits], 4) ?
			fail("a chunk's size that is none: \"%.40s\"", s) : 0;
	case HTTP_CHUNK_END:
		h->state = HTTP_CHUNK_SIZE;
		return *s ? fail("a chunk is longer than its size said") : 0;
	default: /* trailers */
		h->state = *s ? HTTP_TRAILERS : HTTP_DONE;
		return 0;
	}
}

/* Takes bytes from *at, *n (both advance) until something can be told:
 * HEAD: status and headers are whole. BODY: a piece of the body lies at *body.
 * END: the answer is whole; what is left in *at belongs to none. BAD: why. */
static enum http_got http_feed(struct http *h, const char **at, size_t *n, const char **body,
			       size_t *body_n)
{
	while (h->state != HTTP_DONE) {
		bool data = h->state == HTTP_LENGTH || h->state == HTTP_CHUNK;
		enum http_state was = h->state;
		int r;

		if (data && !h->left) {
			h->state = h->state == HTTP_CHUNK ? HTTP_CHUNK_END : HTTP_DONE;
			continue;
		}
		if (!*n)
			return HTTP_MORE;
		if (data || h->state == HTTP_UNTIL_CLOSE) {
			*body = *at;
			*body_n = data && h->left < *n ? h->left : *n;
			h->left -= data ? *body_n : 0;
			*at += *body_n;
			*n -= *body_n;
			return HTTP_BODY;
		}
		r = http_line(h, at, n);
		if (!r)
			return HTTP_MORE;
		if (r < 0 || http_step(h))
			return HTTP_BAD;
		buf_reset(&h->line, 512);
		if (was == HTTP_HEADERS && h->state > HTTP_HEADERS)
			return HTTP_HEAD;
	}
	return HTTP_END;
}

/* The connection ended: END if the answer may end so, else BAD. */
static enum http_got http_eof(struct http *h)
{
	if (h->state == HTTP_UNTIL_CLOSE)
		return HTTP_END;
	fail(h->state == HTTP_STATUS && !h->head ?
		     "the server closed the connection without an answer" :
		     "the connection ended in the middle of the answer");
	return HTTP_BAD;
}
/* What each byte of a list goes through is made fast, from here to the maps; the rest small. */
#pragma GCC push_options
#pragma GCC optimize("O2")
/* === JSON (knows no Kubernetes) ===========================================
 * jsmn finds the tokens, but takes much that is no JSON: so RFC 8259 and UTF-8
 * are checked before, in one walk by descent. */
#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS
#include <jsmn.h>

#define MAX_EVENT 4096 /* what a watch event may add around its object */

/* How many bytes from `at` are an ordinary part of a string: most bytes are, so eight at a
 * time. A byte below the one that is subtracted from it borrows: its highest bit becomes 1. */
static inline size_t json_plain(const char *at, size_t n)
{
	const uint64_t each = 0x0101010101010101;
	size_t i = 0;

	for (uint64_t w; n - i >= sizeof(w); i += sizeof(w)) {
		memcpy(&w, at + i, sizeof(w));
		w |= (w - each * ' ') | ((w ^ each * '"') - each) | ((w ^ each * '\\') - each);
		if (w & each << 7)
			break;
	}
	while (i < n && (signed char)at[i] >= ' ' && at[i] != '"' && at[i] != '\\')
		i++;
	return i;
}

/* Each grammar_ function moves `at` behind what it is named after, or returns
 * false: `at` is then where it went wrong. */
struct grammar {
	const char *at, *end;
	int deepest;
};

/* One byte, if it is among these. */
static bool grammar_any(struct grammar *g, const char *of)
{
	while (*of && g->at < g->end && *of != *g->at)
		of++;
	if (!*of || g->at == g->end)
		return false;
	g->at++;
	return true;
}

static bool json_space(char c)
{
	return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

/* The same behind white space. */
static bool grammar_is(struct grammar *g, const char *of)
{
	while (g->at < g->end && json_space(*g->at))
		g->at++;
	return grammar_any(g, of);
}

/* A character beyond ASCII, up to its last byte, by RFC 3629: no overlong forms,
 * no surrogates. */
static bool grammar_utf8(struct grammar *g)
{
	unsigned char c = *g->at, lo = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
	unsigned char hi = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;

	if (c < 0xc2 || c > 0xf4)
		return false;
	for (int more = c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3; more; more--, lo = 0x80, hi = 0xbf)
		if (++g->at == g->end || (unsigned char)*g->at < lo || (unsigned char)*g->at > hi)
			return false;
	g->at++;
	return true;
}

static bool grammar_string(struct grammar *g)
{
	if (!grammar_is(g, "\""))
		return false;
	for (;;) {
		g->at += json_plain(g->at, g->end - g->at);
		if (grammar_any(g, "\""))
			return true;
		if (!grammar_any(g, "\\")) {
			if (g->at == g->end || !grammar_utf8(g))
				return false;
		} else if (grammar_any(g, "u")) {
			for (int i = 0; i < 4; i++)
				if (!grammar_any(g, "0123456789abcdefABCDEF"))
					return false;
		} else if (!grammar_any(g, "\"\\/bfnrt")) {
			return false;
		}
	}
}

static bool grammar_digits(struct grammar *g)
{
	const char *from = g->at;

	while (grammar_any(g, "0123456789"))
		;
	return g->at > from;
}

static bool grammar_number(struct grammar *g)
{
	grammar_any(g, "-");
	if (!grammar_any(g, "0") && !grammar_digits(g))
		return false;
	if (grammar_any(g, ".") && !grammar_digits(g))
		return false;
	return !grammar_any(g, "eE") || (grammar_any(g, "+-"), grammar_digits(g));
}

static bool grammar_value(struct grammar *g, int depth)
{
	static const char *const words[] = { "true", "false", "null" };
	bool object = grammar_is(g, "{");

	if (g->at < g->end && *g->at == '"' && !object)
		return grammar_string(g);
	if (!object && !grammar_any(g, "[")) {
		for (size_t i = 0, n; i < ARRAY_SIZE(words); i++)
			if ((size_t)(g->end - g->at) >= (n = strlen(words[i])) &&
			    !memcmp(g->at, words[i], n)) {
				g->at += n;
				return true;
			}
		return grammar_number(g);
	}
	g->deepest = depth > g->deepest ? depth : g->deepest;
	if (depth > MAX_DEPTH + 1) /* one more, for an event around its object */
		return false;
	if (grammar_is(g, object ? "}" : "]"))
		return true;
	do
		if ((object && (!grammar_string(g) || !grammar_is(g, ":"))) ||
		    !grammar_value(g, depth + 1))
			return false;
	while (grammar_is(g, ","));
	return grammar_is(g, object ? "}" : "]");
}

/* Why a text is no JSON value, NULL if it is. *good: how many bytes are good. */
static const char *json_check(const char *text, size_t len, int *depth, size_t *good)
{
	struct grammar g = { .at = text, .end = text + len };
	bool whole = grammar_value(&g, 1);

	if (whole)
		grammar_is(&g, ""); /* only white space may follow */
	*depth = g.deepest;
	*good = g.at - text;
	return whole && g.at == g.end		 ? NULL :
		whole				 ? "is no JSON" :
		g.deepest > MAX_DEPTH + 1	 ? "is nested deeper than 64 levels" :
		g.at == g.end			 ? "ends too early" :
						   "is no JSON";
}

/* One parsed value: token 0 is the whole, its members and elements follow. A token's size
 * is not jsmn's: it is the token behind all that belongs to it, to a key its value.
 * Reusable; all zero is empty; the text is not owned. */
struct json {
	const char *text;
	size_t len;
	jsmntok_t *tok;
	int n_tok, cap;
	int depth;	  /* nesting of the whole */
	const char *flaw; /* NULL, or why only the text's beginning stands here */
};

/* Gives the memory back if it is more than what ordinary objects need. */
static void json_reset(struct json *j)
{
	if (j->cap > 16384) {
		free(j->tok);
		j->tok = NULL;
		j->cap = 0;
	}
	j->n_tok = 0;
	j->flaw = NULL;
}

/* The tokens of the first `good` bytes, which json_check found good. 0, or -1
 * with why if there is a flaw. */
static int json_tokens(struct json *j, const char *text, size_t len, size_t good)
{
	jsmn_parser p;

	j->text = text;
	j->len = len;
	jsmn_init(&p);
	while (!j->cap || jsmn_parse(&p, j->text, good, j->tok, j->cap) == JSMN_ERROR_NOMEM) {
		j->cap = j->cap ? j->cap * 2 : 256;
		j->tok = mem(j->tok, j->cap * sizeof(*j->tok));
	}
	j->n_tok = p.toknext;
	for (int i = 0; i < j->n_tok; i++) {
		j->tok[i].size = i + 1;
		if (j->tok[i].end < 0) /* of a beginning: what was not closed */
			j->tok[i].end = good;
	}
	for (int i = j->n_tok - 1, up; i > 0; i--) /* what is in a value is in what that is in */
		if ((up = j->tok[i].parent) >= 0 && j->tok[up].size < j->tok[i].size)
			j->tok[up].size = j->tok[i].size;
	return j->flaw ? fail("byte %zu: %s", good + 1, j->flaw) : 0;
}

/* One whole object or array, and nothing but white space after it. 0, or -1
 * with why: j then holds what can be read of its beginning (perhaps nothing),
 * enough to name an object by, and j->flaw. */
static int json_parse(struct json *j, const char *text, size_t len)
{
	size_t good;

	json_reset(j);
	j->flaw = json_check(text, len, &j->depth, &good);
	if (!j->flaw && !j->depth)
		j->flaw = "is neither an object nor an array";
	return json_tokens(j, text, len, good);
}

/* --- Values. `at` is a token, -1 none: each function takes that too. --- */

static bool json_is(const struct json *j, int at, jsmntype_t type)
{
	return at >= 0 && at < j->n_tok && j->tok[at].type == type;
}

static bool json_is_word(const struct json *j, int at, const char *word)
{
	size_t n = strlen(word);

	return json_is(j, at, JSMN_PRIMITIVE) && (size_t)(j->tok[at].end - j->tok[at].start) == n &&
		!memcmp(j->text + j->tok[at].start, word, n);
}

/* Four hexadecimal digits, which *s moves behind. */
static unsigned json_hex(const char **s)
{
	unsigned c = 0;

	for (int i = 0; i < 4; i++, ++*s)
		c = c << 4 | (isdigit((unsigned char)**s) ? **s - '0' : (**s | 0x20) - 'a' + 10);
	return c;
}

/* One character of a JSON string, decoded as UTF-8 from *s on, which moves; how
 * many bytes, 0: half a surrogate pair. */
static int json_char(const char **s, char utf8[4])
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	unsigned c, low;
	int n;

	utf8[0] = *(*s)++;
	if (utf8[0] != '\\')
		return 1;
	if (*(*s)++ != 'u') {
		utf8[0] = to[strchr(from, (*s)[-1]) - from];
		return 1;
	}
	c = json_hex(s);
	if (c >= 0xd800 && c < 0xdc00 && (*s)[0] == '\\' && (*s)[1] == 'u') {
		*s += 2;
		low = json_hex(s);
		if (low < 0xdc00 || low > 0xdfff)
			return 0;
		c = 0x10000 + ((c & 0x3ff) << 10) + (low & 0x3ff);
	}
	if (c >= 0xd800 && c <= 0xdfff)
		return 0;
	n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
	for (int i = n - 1; i > 0; i--, c >>= 6)
		utf8[i] = 0x80 | (c & 0x3f);
	utf8[0] = n == 1 ? c : (0xf00 >> n) | c;
	return n;
}

/* Appends the decoded string to `out` (always NUL-terminated then). -1: it is
 * no string, or has half a surrogate pair. */
static int json_str(const struct json *j, int at, struct buf *out)
{
	const char *s = j->text, *end = s;
	char utf8[4];

	buf_add(out, "", 0);
	if (!json_is(j, at, JSMN_STRING))
		return -1;
	for (s += j->tok[at].start, end += j->tok[at].end; s < end;) {
		size_t plain = json_plain(s, end - s), n = plain ? 0 : json_char(&s, utf8);

		if (!plain && !n)
			return -1;
		buf_add(out, plain ? s : utf8, plain + n);
		s += plain;
	}
	return 0;
}

/* Whether the inside of a JSON string, still escaped, denotes these bytes. */
static bool json_same(const char *s, size_t len, const char *plain, size_t n)
{
	const char *end = s + len;
	char utf8[4];

	if (len < n || (n && *s != *plain && *s != '\\')) /* what is escaped is longer */
		return false;
	if (len == n) /* nearly always */
		return !memcmp(s, plain, n) && !memchr(s, '\\', n);
	while (s < end) {
		size_t more = json_char(&s, utf8);

		if (!more || more > n || memcmp(plain, utf8, more))
			return false;
		plain += more;
		n -= more;
	}
	return !n;
}

static bool json_eq_n(const struct json *j, int at, const char *plain, size_t n)
{
	return json_is(j, at, JSMN_STRING) &&
		json_same(j->text + j->tok[at].start, j->tok[at].end - j->tok[at].start, plain, n);
}

static bool json_eq(const struct json *j, int at, const char *plain)
{
	return json_eq_n(j, at, plain, strlen(plain));
}

/* A whole number from min to max, written without fraction or exponent; -1 if
 * it is anything else. */
static int json_int(const struct json *j, int at, long min, long max, long *value)
{
	const char *s = json_is(j, at, JSMN_PRIMITIVE) ? j->text + j->tok[at].start : "x";
	bool minus = *s == '-';
	long v = 0;

	for (s += minus; isdigit((unsigned char)*s) && v < 100000000; s++)
		v = v * 10 + (*s - '0');
	if (*s == 'x' || s != j->text + j->tok[at].end)
		return -1;
	*value = minus ? -v : v;
	return *value < min || *value > max ? -1 : 0;
}

/* The elements of an array, or the keys of an object (the value is the token
 * behind its key):
 *   for (int i = json_first(j, at); i >= 0; i = json_next(j, at, i))  */
static int json_first(const struct json *j, int at)
{
	if (!json_is(j, at, JSMN_ARRAY) && !json_is(j, at, JSMN_OBJECT))
		return -1;
	return at + 1 < j->tok[at].size ? at + 1 : -1;
}

static int json_next(const struct json *j, int at, int i)
{
	return j->tok[i].size < j->tok[at].size ? j->tok[i].size : -1;
}

/* The value of a member; of duplicate keys the last counts. -1 if there is
 * none or it is null, or `at` is no object. */
static int json_find(const struct json *j, int at, const char *key, size_t n)
{
	int value = -1;

	for (int i = json_is(j, at, JSMN_OBJECT) ? json_first(j, at) : -1; i >= 0;
	     i = json_next(j, at, i))
		if (i + 1 < j->n_tok && j->tok[i + 1].parent == i && json_eq_n(j, i, key, n))
			value = i + 1;
	return json_is_word(j, value, "null") ? -1 : value;
}

static int json_get(const struct json *j, int at, const char *key)
{
	return json_find(j, at, key, strlen(key));
}

/* Where a value stands under `root`, as in "spec.ports[0].port". */
static void json_path(const struct json *j, int root, int at, struct buf *out)
{
	int up = at > root ? j->tok[at].parent : -1, n = 0;

	if (json_is(j, up, JSMN_STRING)) {
		json_path(j, root, j->tok[up].parent, out);
		buf_printf(out, "%s%.*s", out->at[out->len - 1] != ' ' ? "." : "",
			   j->tok[up].end - j->tok[up].start, j->text + j->tok[up].start);
	} else if (up >= 0) {
		json_path(j, root, up, out);
		for (int i = json_first(j, up); i >= 0 && i < at; i = json_next(j, up, i))
			n++;
		buf_printf(out, "[%d]", n);
	}
}

/* === splitting a stream of JSON ===========================================
 * Memory holds one object, without the white space between its tokens. */
enum split_shape { SPLIT_EVENTS, SPLIT_LIST };
enum split_got { SPLIT_MORE, SPLIT_ITEM, SPLIT_HEAD, SPLIT_BAD };

struct split { /* all zero + shape */
	enum split_shape shape;
	/* what split_feed just gave out, until the next call */
	const char *text, *flaw; /* flaw: NULL, or too long or deep: text may be a beginning */
	size_t len, size, good;	 /* size: as it came, with white space and a HEAD's items */
	int nesting;
	unsigned n_lists; /* arrays under "items" begun in this head: of two the last counts */
	/* inside */
	struct buf item, head;
	int depth;
	size_t key;	 /* where in head its last string begins, behind the quote */
	size_t seen;	 /* bytes since the head began */
	size_t from, to; /* the item's place in those */
	bool in_string, escaped, space, in_items, in_item, given;
};

static void split_free(struct split *s)
{
	buf_free(&s->item);
	buf_free(&s->head);
}

/* Nothing was begun that is not whole: the stream may end here. */
static bool split_idle(const struct split *s)
{
	return !s->depth;
}

/* n bytes to what they belong to: the item, or the head around the items. A
 * white space is kept only where it parts what else would be one word. */
static void split_keep(struct split *s, const char *at, size_t n)
{
	struct buf *b = s->in_item ? &s->item : &s->head;
	size_t most = MAX_OBJECT + MAX_EVENT + 1;

	if (s->space && b->len && !strchr("{}[]:,\"", b->at[b->len - 1]) &&
	    !strchr("{}[]:,\"", *at))
		buf_add(b, " ", 1);
	s->space = false;
	buf_add(b, at, b->len + n < most ? n : b->len < most ? most - b->len : 0);
	s->to = s->seen + n;
}

/* What is whole goes out, if it is good JSON. */
static enum split_got split_give(struct split *s, enum split_got got)
{
	const struct buf *b = s->in_item ? &s->item : &s->head;

	s->text = b->at;
	s->len = b->len;
	s->size = s->to - (s->in_item ? s->from : 0);
	s->flaw = json_check(s->text, s->len, &s->nesting, &s->good);
	if (s->size > MAX_OBJECT + (s->shape == SPLIT_EVENTS ? MAX_EVENT : 0) &&
	    (s->in_item || !s->n_lists))
		s->flaw = "is longer than 2 MiB";
	else if (s->flaw && s->nesting <= MAX_DEPTH + 1)
		return fail("no JSON, or no UTF-8: %.40s", s->text + s->good), SPLIT_BAD;
	s->given = true;
	s->in_item = false;
	return got;
}

/* What was given out goes. */
static void split_forget(struct split *s)
{
	s->given = false;
	buf_reset(&s->item, 65536);
	if (!s->depth) {
		buf_reset(&s->head, 65536);
		s->seen = s->n_lists = 0;
	}
}

/* In the head c came, which stands at n: is it a key, or does it begin or end "items"? */
static void split_head(struct split *s, char c, size_t n)
{
	struct grammar key = { .at = s->head.at + s->key - 1, .end = s->head.at + n };

	if (c == '"' && s->depth == 1)
		s->key = n + 1;
	s->in_items &= s->depth > 1;
	if (c == '[' && s->depth == 2 && n >= s->key + 2 && !memcmp(key.end - 2, "\":", 2) &&
	    grammar_string(&key) && json_same(s->head.at + s->key, n - 2 - s->key, "items", 5)) {
		s->in_items = true;
		s->n_lists++;
	}
}

/* How many bytes are surely of what was begun: a string, and what is nested so
 * deep that neither an item nor a head can end in it; but for white space. */
static size_t split_run(struct split *s, const char *at, size_t n)
{
	bool in_string = s->in_string, escaped = s->escaped;
	size_t i = 0, plain;
	int depth = s->depth;

	for (; i < n && (in_string || (depth > 2 && !json_space(at[i]))); i++) {
		char c = at[i];

		if (!in_string) {
			in_string = c == '"';
			depth += (c == '{' || c == '[') - (c == '}' || c == ']');
		} else if (!escaped && (plain = json_plain(at + i, n - i))) {
			i += plain - 1;
		} else {
			in_string = escaped || c != '"';
			escaped = !escaped && c == '\\';
		}
	}
	s->in_string = in_string;
	s->escaped = escaped;
	s->depth = depth;
	return i;
}

/* Takes bytes from *at, *n (both advance) until something is whole:
 * SPLIT_EVENTS: objects one after another, each an ITEM.
 * SPLIT_LIST: objects one after another. What stands in an "items" array comes
 * as ITEMs, then the object as HEAD, with 0 for each item, so that its commas
 * can be checked. An object that is no list comes as HEAD too.
 * What is too long comes in its turn; json_take has its beginning, and
 * model_put names it. BAD, with why: the stream is lost. */
static enum split_got split_feed(struct split *s, const char **at, size_t *n)
{
	enum split_got got = SPLIT_MORE;

	for (size_t used; *n && got == SPLIT_MORE; *at += used, *n -= used, s->seen += used) {
		char c = **at;
		size_t before;

		used = split_run(s, *at, *n);
		if (used) {
			split_keep(s, *at, used);
			continue;
		}
		used = 1;
		if (json_space(c)) {
			s->space = true;
			s->seen -= !s->depth;
			continue;
		}
		if (s->in_item && s->depth == 2 && (c == ',' || c == ']')) {
			used = 0; /* what ends an item is the head's */
			got = split_give(s, SPLIT_ITEM);
			continue;
		}
		if (s->given)
			split_forget(s);
		if (!s->depth && c != '{')
			return fail("no object begins with: %.1s", c ? &c : " "), SPLIT_BAD;
		if (s->in_items && !s->in_item && s->depth == 2 && c != ',' && c != ']') {
			split_keep(s, "0", 1);
			s->in_item = true;
			s->from = s->seen;
		}
		before = s->head.len;
		s->in_string = c == '"';
		s->depth += (c == '{' || c == '[') - (c == '}' || c == ']');
		split_keep(s, *at, 1);
		if (!s->depth)
			got = split_give(s, s->shape == SPLIT_LIST ? SPLIT_HEAD : SPLIT_ITEM);
		else if (!s->in_item && s->shape == SPLIT_LIST)
			split_head(s, c, before);
	}
	return got;
}

/* The tokens of what split_feed just gave out. As json_parse. */
static int json_take(struct json *j, const struct split *s)
{
	json_reset(j);
	j->depth = s->nesting;
	j->flaw = s->flaw;
	return json_tokens(j, s->text, s->len, s->good);
}
/* === objects (JSON into plain C) ==========================================
 * A Service, EndpointSlice, Node or ServiceCIDR becomes one compact block, or is
 * refused with a line that names it and the field. Nothing of the text stays. */
enum kind {
	SERVICES,
	SLICES,
	NODES,	       /* and what follows: we can do without, see watch_denied */
	SERVICE_CIDRS,
	N_KINDS
};

static const struct {
	const char *name, *api;
	bool namespaced;
} kinds[N_KINDS] = {
	[SERVICES] = { "Service", "v1", true },
	[SLICES] = { "EndpointSlice", "discovery.k8s.io/v1", true },
	[NODES] = { "Node", "v1", false },
	[SERVICE_CIDRS] = { "ServiceCIDR", "networking.k8s.io/v1", false },
};

static const char *proto_name(uint8_t proto)
{
	return proto == IPPROTO_TCP ? "TCP" : proto == IPPROTO_UDP ? "UDP" : "SCTP";
}

/* --- hash tables: things with a link in them, by hash ---------------------- */
struct link {
	struct link *next;
	uint64_t hash;
};

struct table {
	struct link **bucket;
	size_t n, size; /* size: 0 or a power of two */
};

#define TABLE_EACH(t, l) /* the one at hand may be removed */                                      \
	for (size_t l##_i = 0; l##_i < (t)->size; l##_i++)                                         \
		for (struct link *l = (t)->bucket[l##_i], *l##_next; l && (l##_next = l->next, 1); \
		     l = l##_next)

/* The next link of this hash behind `at`, or the first if that is NULL. */
static struct link *table_next(const struct table *t, struct link *at, uint64_t hash)
{
	at = at ? at->next : t->size ? t->bucket[hash & (t->size - 1)] : NULL;
	while (at && at->hash != hash)
		at = at->next;
	return at;
}

static void table_add(struct table *t, struct link *l, uint64_t hash)
{
	if (t->n == t->size * 2) { /* two a bucket: memory counts for more */
		struct table big = { .size = t->size ? t->size * 2 : 16 };

		big.bucket = mem(NULL, big.size * sizeof(*big.bucket));
		memset(big.bucket, 0, big.size * sizeof(*big.bucket));
		TABLE_EACH (t, old)
			table_add(&big, old, old->hash);
		free(t->bucket);
		*t = big;
	}
	l->hash = hash;
	l->next = t->bucket[hash & (t->size - 1)];
	t->bucket[hash & (t->size - 1)] = l;
	t->n++;
}

static void table_remove(struct table *t, struct link *l)
{
	struct link **at = &t->bucket[l->hash & (t->size - 1)];

	while (*at != l)
		at = &(*at)->next;
	*at = l->next;
	t->n--;
}

/* --- what is kept of an object -------------------------------------------- */
struct port {
	uint32_t name; /* where it begins in the texts */
	uint16_t number;
	uint8_t proto, zero;
};

/* One block. Two of one size say the same if the bytes from `size` on do. */
struct object {
	struct link link;	/* these are the model's: by kind, namespace and name; */
	struct object *sibling; /* the next slice of the same service; */
	uint32_t bad;		/* a hash of the line about its last news, 0: that was good; */
	uint16_t round;		/* of lists: the last one it stood in */
	uint8_t kind;
	bool unnamed; /* its name is not known: the line about it stands for that */
	_Alignas(8) uint32_t size; /* on 32 bits too: no gap, and none at the end */
	uint32_t blank : 1;  /* nothing but its name: bad, or ignored by rule 1 and the like */
	uint32_t served : 1; /* --selector and --namespace take it */
	uint32_t internal_local : 1, external_local : 1, v4 : 1, n_cluster : 2, affinity : 25;
	uint32_t created; /* seconds since 1970; 0: not known, the oldest */
	uint32_t n_external, n_lb, n_cidrs, n_ports, n_endpoints;
	/* cluster, external, lb; then sources, or a ServiceCIDR's ranges; ports; texts: namespace,
	 * name, a slice's service or a Node's zone, a slice's endpoints, names of ports */
	struct in6_addr at[];
};

_Static_assert(sizeof(struct object) - offsetof(struct object, size) == 32, "no gaps");

/* An endpoint in a slice: a byte of conditions, 4 or 16 of address, then texts: its
 * node; with ENDPOINT_HINTS those ("zZONE" or "nNODE"), and an empty one. Of two with
 * the same address and port the one with the lesser conditions counts (rule 6). */
enum {
	ENDPOINT_NOT_SERVING = 1,
	ENDPOINT_NOT_READY = 2,
	ENDPOINT_TERMINATING = 4,
	ENDPOINT_HINTS = 8,
};

static struct cidr *object_cidrs(const struct object *o)
{
	return (struct cidr *)(o->at + o->n_cluster + o->n_external + o->n_lb);
}

static struct port *object_ports(const struct object *o)
{
	return (struct port *)(object_cidrs(o) + o->n_cidrs);
}

/* A port's name; the first of its texts is the namespace. */
static const char *object_text(const struct object *o, uint32_t at)
{
	return (const char *)(object_ports(o) + o->n_ports) + at;
}

static const char *text_after(const char *text)
{
	return text + strlen(text) + 1;
}

static const char *object_name(const struct object *o)
{
	return text_after(object_text(o, 0));
}

/* A slice's service, a Node's zone. */
static const char *object_more(const struct object *o)
{
	return text_after(object_name(o));
}

/* How many frontends, source ranges or backends it can make: one of each address and port. */
static uint64_t object_spread(const struct object *o)
{
	return (uint64_t)(o->n_ports ? o->n_ports : 1) *
		(o->n_cluster + o->n_external + o->n_lb + o->n_cidrs + o->n_endpoints);
}

/* Bytes that it takes, roughly, with all that is made of it. */
static uint64_t object_cost(const struct object *o)
{
	return o->size + 256 + object_spread(o) * 64;
}

/* The first port of this number, by name: the others are not to be reached. */
static const struct port *object_port(const struct object *o, const struct port *like)
{
	for (const struct port *p = object_ports(o); p < object_ports(o) + o->n_ports; p++)
		if (p->number == like->number && p->proto == like->proto)
			return p;
	return NULL;
}

/* The ClusterIP of a family, or NULL. */
static const struct in6_addr *object_cluster_ip(const struct object *o, bool v4)
{
	for (uint32_t i = 0; i < o->n_cluster; i++)
		if (addr_is_v4(&o->at[i]) == v4)
			return &o->at[i];
	return NULL;
}

static int addr_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct in6_addr));
}

static int cidr_order(const void *a, const void *b)
{
	int c = addr_order(a, b);

	return c ? c : ((const struct cidr *)a)->bits - ((const struct cidr *)b)->bits;
}

/* --- label selectors, as kubectl -l ---------------------------------------- */
struct filter { /* which services are served */
	const char *selector;
	const char **namespaces;
	int n_namespaces; /* 0: all */
};

#define SELECTOR_SPACE " \t\r\n"

/* The word at *s, moving *s behind it and the white space around. */
static const char *selector_word(const char **s, size_t *n)
{
	const char *word = *s + strspn(*s, SELECTOR_SPACE);

	*n = strcspn(word, SELECTOR_SPACE "=!(),<>");
	*s = word + *n + strspn(word + *n, SELECTOR_SPACE);
	return word;
}

/* 1 to 63 of [-_.A-Za-z0-9], a letter or digit at both ends; before a key
 * perhaps a DNS subdomain and a slash. */
static bool label_valid(const char *s, size_t n, bool key)
{
	const char *slash = key ? memchr(s, '/', n) : NULL;
	size_t prefix = slash ? slash - s : 0;

	for (size_t i = 0; i < prefix; i++)
		if (!islower((unsigned char)s[i]) && !isdigit((unsigned char)s[i]) &&
		    (!i || !strchr("-.", s[i]) || strchr("./", s[i + 1]) || s[i - 1] == '.'))
			return false;
	if (slash && (!prefix || prefix > MAX_NAME))
		return false;
	s += slash ? prefix + 1 : 0;
	n -= slash ? prefix + 1 : 0;
	for (size_t i = 0; i < n; i++)
		if (!isalnum((unsigned char)s[i]) && (!i || i == n - 1 || !strchr("-_.", s[i])))
			return false;
	return n <= 63 && (n || !key);
}

/* Whether the labels meet the requirement at *s, which moves behind it; NULL: it
 * is not understood. */
static bool selector_requirement(const char **s, const struct json *j, int labels)
{
	bool not, set = false, hit;
	const char *word;
	size_t n;
	int value;

	*s += strspn(*s, SELECTOR_SPACE);
	not = **s == '!';
	*s += not ;
	word = selector_word(s, &n);
	value = json_find(j, labels, word, n);
	hit = value >= 0;
	if (!label_valid(word, n, true))
		goto bad;
	if (not || !**s || **s == ',')
		return hit != not ;
	word = selector_word(s, &n);
	if (n) {
		set = true;
		not = n == 5 && !memcmp(word, "notin", 5);
		if ((!not &&(n != 2 || memcmp(word, "in", 2))) || **s != '(')
			goto bad;
	} else {
		not = **s == '!';
		*s += not ;
		if (**s != '=')
			goto bad;
		*s += !not &&(*s)[1] == '=';
	}
	hit = false;
	do {
		++*s;
		word = selector_word(s, &n);
		hit |= value >= 0 && json_eq_n(j, value, word, n);
		if (!label_valid(word, n, false))
			goto bad;
	} while (set && **s == ',');
	if (!set)
		return hit != not ;
	if (**s == ')') {
		*s += 1 + strspn(*s + 1, SELECTOR_SPACE);
		return hit != not ;
	}
bad:
	*s = NULL;
	return false;
}

/* Whether the labels meet it all; -1, with why: it is not understood. */
static int selector_match(const char *text, const struct json *j, int labels)
{
	const char *s = text ? text : "";
	bool all = true;

	if (!s[strspn(s, SELECTOR_SPACE)])
		return true;
	for (;; s++) {
		all &= selector_requirement(&s, j, labels);
		if (!s || (*s && *s != ','))
			return fail("selector \"%s\" is not understood; write it as for kubectl -l",
				    text);
		if (!*s)
			return all;
	}
}

/* --- reading ---------------------------------------------------------------
 * The first flaw is kept in `why` and ends nothing; who reads asks at the end.
 * Every value is a token; -1 is none, as null is. */
struct reader {
	const struct json *j;
	const struct filter *filter;
	int root, meta, labels;	 /* tokens */
	struct object o;	 /* as far as known; */
	struct buf fixed, texts; /* and what will stand behind it */
	size_t n_names;		 /* bytes of "NAMESPACE\0NAME\0", 0: not known */
	struct buf text;	 /* the string read last */
	bool bad;
};

__attribute__((format(printf, 4, 5))) static void flaw(struct reader *r, int at, const char *key,
						       const char *fmt, ...)
{
	const char *ns = r->texts.at, *slash = kinds[r->o.kind].namespaced ? "/" : "";
	struct buf b = { 0 };
	char text[160];
	va_list ap;

	if (r->bad)
		return;
	r->bad = true;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	buf_printf(&b, "%s", kinds[r->o.kind].name);
	if (r->n_names)
		buf_printf(&b, " %s%s%.400s", ns, slash, text_after(ns));
	buf_add(&b, ": ", 2);
	json_path(r->j, r->root, at, &b);
	fail("%s%s%s %s", b.at, *key && b.at[b.len - 1] != ' ' ? "." : "", key, text);
	buf_free(&b);
}

static int read_typed(struct reader *r, int at, jsmntype_t type)
{
	if (at < 0 || json_is_word(r->j, at, "null"))
		return -1;
	if (json_is(r->j, at, type))
		return at;
	flaw(r, at, "", "must be %s",
	     type == JSMN_OBJECT	? "an object" :
		     type == JSMN_ARRAY ? "an array" :
					  "a string");
	return -1;
}

static int read_member(struct reader *r, int at, const char *key, jsmntype_t type)
{
	return read_typed(r, json_get(r->j, at, key), type);
}

/* Each element of an array that is of this type; null is none. */
#define READ_EACH(r, i, parent, key, type)                                                         \
	for (int i##_in = read_member(r, parent, key, JSMN_ARRAY), i = json_first((r)->j, i##_in); \
	     i >= 0; i = json_next((r)->j, i##_in, i))                                             \
		if (read_typed(r, i, type) >= 0)

/* A string decoded into r->text, empty if there is none. */
static int read_string(struct reader *r, int at)
{
	r->text.len = 0;
	buf_add(&r->text, "", 0);
	at = read_typed(r, at, JSMN_STRING);
	if (at >= 0 && json_str(r->j, at, &r->text))
		flaw(r, at, "", "has half a surrogate pair");
	return at;
}

/* Whether a string member is this word. */
static bool read_is(struct reader *r, int at, const char *key, const char *word)
{
	at = read_string(r, json_get(r->j, at, key));
	return json_eq(r->j, at, word);
}

/* A name, in r->text: no control characters, at most `most` characters (0: any). */
static int read_name(struct reader *r, int at, size_t most)
{
	size_t n = 0;

	at = read_string(r, at);
	for (size_t i = 0; i < r->text.len; i++) {
		unsigned char c = r->text.at[i], next = r->text.at[i + 1];

		n += (c & 0xc0) != 0x80;
		if (c < ' ' || c == 0x7f || (c == 0xc2 && next < 0xa0))
			flaw(r, at, "", "has a control character");
	}
	if (most && n > most)
		flaw(r, at, "", "is longer than %zu characters", most);
	return at;
}

/* What was read last is kept. */
static void keep_text(struct reader *r)
{
	buf_add(&r->texts, r->text.at, r->text.len + 1);
}

/* A condition: `flag` if it is as `value`, which is not its default. */
static uint8_t read_condition(struct reader *r, int at, const char *key, const char *value,
			      uint8_t flag)
{
	at = json_get(r->j, at, key);
	if (at >= 0 && !json_is_word(r->j, at, "true") && !json_is_word(r->j, at, "false"))
		flaw(r, at, "", "must be true or false");
	return json_is_word(r->j, at, value) ? flag : 0;
}

/* A number, 0 if absent. */
static long read_number(struct reader *r, int at, const char *key, long min, long max)
{
	long v = 0;

	at = json_get(r->j, at, key);
	if (at >= 0 && json_int(r->j, at, min, max, &v))
		flaw(r, at, "", "must be a whole number from %ld to %ld", min, max);
	return v;
}

/* An address; false if there is none: absent, null or empty. */
static bool read_address(struct reader *r, int at, struct in6_addr *a)
{
	if (read_string(r, at) < 0 || !r->text.len)
		return false;
	if (addr_parse(r->text.at, r->text.len, a))
		return true;
	flaw(r, at, "", "is no IP address: %.60s", r->text.at);
	return false;
}

/* The same, to keep. */
static bool keep_address(struct reader *r, int at)
{
	struct in6_addr a;

	if (!read_address(r, at, &a))
		return false;
	buf_add(&r->fixed, &a, sizeof(a));
	return true;
}

static uint8_t read_protocol(struct reader *r, int at)
{
	static const uint8_t protos[] = { IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP };

	at = read_string(r, json_get(r->j, at, "protocol"));
	for (size_t i = 0; i < ARRAY_SIZE(protos); i++)
		if (at < 0 || json_eq(r->j, at, proto_name(protos[i])))
			return protos[i];
	flaw(r, at, "", "must be TCP, UDP or SCTP, not %.40s", r->text.at);
	return 0;
}

/* RFC 3339 as seconds; 0 if it is not. */
static uint32_t read_timestamp(const char *s)
{
	int hours = 0, minutes = 0;
	struct tm t = { 0 };
	char sign[2] = "";
	int64_t v;

	s = strptime(s, "%Y-%m-%dT%H:%M:%S", &t);
	if (s && *s == '.')
		s += strspn(s, ".0123456789");
	if (!s || (strcmp(s, "Z") && sscanf(s, "%1[+-]%2d:%2d", sign, &hours, &minutes) != 3))
		return 0;
	v = (int64_t)timegm(&t) - (*sign == '-' ? -60 : 60) * (hours * 60 + minutes);
	return v < 0 ? 0 : v < UINT32_MAX ? v : UINT32_MAX;
}

/* Who it is, to the texts. */
static void read_identity(struct reader *r)
{
	bool namespaced = kinds[r->o.kind].namespaced;

	if (!json_is(r->j, r->root, JSMN_OBJECT))
		flaw(r, -1, "it", "must be an object");
	r->meta = read_member(r, r->root, "metadata", JSMN_OBJECT);
	read_name(r, namespaced ? json_get(r->j, r->meta, "namespace") : -1, MAX_NAME);
	if (!r->text.len && namespaced)
		buf_add(&r->text, "default", 7);
	keep_text(r);
	read_name(r, json_get(r->j, r->meta, "name"), MAX_NAME);
	if (!r->text.len && !r->j->flaw) /* else it may be behind the flaw */
		flaw(r, r->meta, r->meta < 0 ? "metadata.name" : "name", "is missing");
	keep_text(r);
	if (!r->bad && r->text.len)
		r->n_names = r->texts.len;
}

static void read_labels(struct reader *r)
{
	int at = read_member(r, r->meta, "labels", JSMN_OBJECT);

	for (int i = json_first(r->j, at); i >= 0; i = json_next(r->j, at, i))
		read_typed(r, i + 1, JSMN_STRING);
	r->o.blank = kinds[r->o.kind].namespaced &&
		(json_get(r->j, at, "service.kubernetes.io/service-proxy-name") >= 0 ||
		 json_get(r->j, at, "service.kubernetes.io/headless") >= 0);
	r->labels = at;
}

static int port_by_name(const void *a, const void *b, void *texts)
{
	const struct port *p = a, *q = b;
	int c = strcmp((char *)texts + p->name, (char *)texts + q->name);

	c = c ? c : strcmp(proto_name(p->proto), proto_name(q->proto));
	return c ? c : p->name < q->name ? -1 : p->name > q->name; /* as they came */
}

/* The ports of a service, sorted; of one name and protocol the last counts. Or of
 * a slice: those without name or number are left out. */
static void read_ports(struct reader *r, int parent)
{
	bool slice = r->o.kind == SLICES;
	size_t first = r->fixed.len;
	uint32_t n, kept = 0;
	struct port *p;

	READ_EACH (r, i, parent, "ports", JSMN_OBJECT) {
		struct port port = { .name = r->texts.len, .proto = read_protocol(r, i) };
		bool named = read_name(r, json_get(r->j, i, "name"), MAX_PORTNAME) >= 0;

		port.number = read_number(r, i, "port", !slice, 65535);
		if (!slice && !port.number)
			flaw(r, i, "port", "is missing");
		if (slice && (!named || !port.number))
			continue;
		keep_text(r);
		buf_add(&r->fixed, &port, sizeof(port));
	}
	n = r->o.n_ports = (r->fixed.len - first) / sizeof(*p);
	if (slice || !n)
		return;
	p = (struct port *)(r->fixed.at + first);
	qsort_r(p, n, sizeof(*p), port_by_name, r->texts.at);
	for (uint32_t i = 0; i < n; i++)
		if (i + 1 == n || p[i].proto != p[i + 1].proto ||
		    strcmp(r->texts.at + p[i].name, r->texts.at + p[i + 1].name))
			p[kept++] = p[i];
	r->fixed.len = first + kept * sizeof(*p);
	r->o.n_ports = kept;
}

/* clusterIPs[i] of ipFamilies[i], the first of a family; without families
 * clusterIP alone. */
static void read_cluster_ips(struct reader *r, int spec)
{
	int families = read_member(r, spec, "ipFamilies", JSMN_ARRAY);
	int ips = read_member(r, spec, "clusterIPs", JSMN_ARRAY);
	int family = json_first(r->j, families), ip = json_first(r->j, ips);
	bool have[2] = { false };

	if (keep_address(r, json_get(r->j, spec, "clusterIP")) && family < 0)
		r->o.n_cluster = 1;
	r->fixed.len = r->o.n_cluster * sizeof(struct in6_addr);
	while (ip >= 0 || family >= 0) {
		struct in6_addr a;
		bool there = read_address(r, ip, &a), v4;

		read_string(r, family);
		v4 = json_eq(r->j, family, "IPv4");
		if (there && (v4 || json_eq(r->j, family, "IPv6"))) {
			if (addr_is_v4(&a) != v4)
				flaw(r, ip, "", "is not of its ipFamily");
			r->o.n_cluster += !have[v4] && keep_address(r, ip);
			have[v4] = true;
		}
		ip = ip < 0 ? -1 : json_next(r->j, ips, ip);
		family = family < 0 ? -1 : json_next(r->j, families, family);
	}
}

/* externalIPs, then the load-balancer IPs that nodes are to serve. */
static void read_external_ips(struct reader *r, int spec)
{
	int lb = read_member(r, r->root, "status", JSMN_OBJECT);

	READ_EACH (r, i, spec, "externalIPs", JSMN_STRING)
		r->o.n_external += keep_address(r, i);
	lb = read_member(r, lb, "loadBalancer", JSMN_OBJECT);
	READ_EACH (r, i, lb, "ingress", JSMN_OBJECT)
		if (json_get(r->j, i, "ipMode") < 0 || read_is(r, i, "ipMode", "VIP"))
			r->o.n_lb += keep_address(r, json_get(r->j, i, "ip"));
}

static void read_cidrs(struct reader *r, int spec, const char *key)
{
	static const char space[] = " \t\n\v\f\r";

	READ_EACH (r, i, spec, key, JSMN_STRING) {
		struct cidr c;
		size_t from, len;

		read_string(r, i);
		memset(&c, 0, sizeof(c)); /* the gaps too: it is compared as bytes */
		from = strspn(r->text.at, space);
		for (len = r->text.len; len > from && strchr(space, r->text.at[len - 1]); len--)
			;
		if (!cidr_parse(r->text.at + from, len - from, &c))
			flaw(r, i, "", "is no CIDR: %.60s", r->text.at);
		addr_mask(&c.addr, c.bits);
		buf_add(&r->fixed, &c, sizeof(c));
		r->o.n_cidrs++;
	}
}

static uint32_t read_affinity(struct reader *r, int spec)
{
	int at = read_member(r, spec, "sessionAffinityConfig", JSMN_OBJECT);
	uint32_t seconds;

	if (!read_is(r, spec, "sessionAffinity", "ClientIP"))
		return 0;
	at = read_member(r, at, "clientIP", JSMN_OBJECT);
	seconds = read_number(r, at, "timeoutSeconds", 1, 86400);
	return seconds ? seconds : 10800;
}

/* --selector and --namespace. */
static bool read_served(struct reader *r)
{
	const struct filter *f = r->filter;
	bool in = !f->n_namespaces;

	for (int i = 0; i < f->n_namespaces; i++)
		in |= !strcmp(f->namespaces[i], r->texts.at);
	return in && selector_match(f->selector, r->j, r->labels) > 0;
}

static void read_service(struct reader *r)
{
	int spec = read_member(r, r->root, "spec", JSMN_OBJECT);

	r->o.blank |= read_is(r, spec, "type", "ExternalName");
	r->o.blank |= read_is(r, spec, "clusterIP", "None") || !r->text.len;
	if (r->o.blank || r->bad)
		return;
	r->o.served = read_served(r);
	read_string(r, json_get(r->j, r->meta, "creationTimestamp"));
	r->o.created = read_timestamp(r->text.at);
	read_cluster_ips(r, spec);
	read_external_ips(r, spec);
	read_cidrs(r, spec, "loadBalancerSourceRanges");
	r->o.internal_local = read_is(r, spec, "internalTrafficPolicy", "Local");
	r->o.external_local = read_is(r, spec, "externalTrafficPolicy", "Local");
	r->o.affinity = read_affinity(r, spec);
	read_ports(r, spec);
	if (object_spread(&r->o) > MAX_SPREAD)
		flaw(r, spec, "ports", "times its addresses and source ranges are more than %d", MAX_SPREAD);
}

/* The hints, each with its kind before it. */
static void read_hints(struct reader *r, int hints, const char *key, char kind, size_t most)
{
	READ_EACH (r, i, hints, key, JSMN_OBJECT) {
		read_name(r, json_get(r->j, i, "name"), most);
		buf_add(&r->texts, &kind, 1);
		keep_text(r);
	}
}

/* An endpoint, unless it has no address of the slice's family. */
static void read_endpoint(struct reader *r, int at)
{
	int conditions = read_member(r, at, "conditions", JSMN_OBJECT);
	int hints = read_member(r, at, "hints", JSMN_OBJECT);
	int ips = read_member(r, at, "addresses", JSMN_ARRAY);
	size_t before = r->texts.len;
	uint8_t flags = read_condition(r, conditions, "ready", "false", ENDPOINT_NOT_READY) |
		read_condition(r, conditions, "serving", "false", ENDPOINT_NOT_SERVING) |
		read_condition(r, conditions, "terminating", "true", ENDPOINT_TERMINATING) |
		(hints < 0 ? 0 : ENDPOINT_HINTS);
	struct in6_addr a = { 0 };
	bool there = read_address(r, json_first(r->j, ips), &a) && addr_is_v4(&a) == r->o.v4;

	buf_add(&r->texts, &flags, 1);
	buf_add(&r->texts, a.s6_addr + (r->o.v4 ? 12 : 0), r->o.v4 ? 4 : 16);
	read_name(r, json_get(r->j, at, "nodeName"), MAX_NAME);
	keep_text(r);
	read_hints(r, hints, "forZones", 'z', 0);
	read_hints(r, hints, "forNodes", 'n', MAX_NAME);
	buf_add(&r->texts, "", hints >= 0);
	r->o.n_endpoints += there;
	r->texts.len = there ? r->texts.len : before;
}

static void read_slice(struct reader *r)
{
	read_name(r, json_get(r->j, r->labels, "kubernetes.io/service-name"), MAX_NAME);
	keep_text(r);
	r->o.blank |= !r->text.len;
	r->o.v4 = read_is(r, r->root, "addressType", "IPv4");
	r->o.blank |= !r->o.v4 && !read_is(r, r->root, "addressType", "IPv6");
	if (r->o.blank || r->bad)
		return;
	READ_EACH (r, i, r->root, "endpoints", JSMN_OBJECT)
		read_endpoint(r, i);
	read_ports(r, r->root);
}

/* Nothing is to be kept but who it is, and what was wrong if it is bad. */
static void reader_blank(struct reader *r)
{
	r->o = (struct object){ .kind = r->o.kind, .blank = true, .unnamed = !r->n_names };
	r->o.bad = r->bad ? hash64(0, why, strlen(why)) | 1 : 0;
	r->fixed.len = 0;
	r->texts.len = r->n_names;
	if (r->o.unnamed) {
		buf_add(&r->texts, "", 1);
		buf_add(&r->texts, why, strlen(why) + 1);
	}
}

/* The object at a token, to be freed. If it is ->bad, `why` says why. */
static struct object *object_read(const struct filter *f, enum kind k, const struct json *j, int at)
{
	struct reader r = { .j = j, .filter = f, .root = at, .o.kind = k, .labels = -1 };
	struct object *o;
	int level = 1;

	read_identity(&r);
	for (int up = json_is(j, at, JSMN_OBJECT) ? j->tok[at].parent : -1; up >= 0; up = j->tok[up].parent)
		level += !json_is(j, up, JSMN_STRING);
	if (j->flaw)
		flaw(&r, -1, "it", "%s", j->flaw);
	else if (json_is(j, at, JSMN_OBJECT) && (size_t)(j->tok[at].end - j->tok[at].start) > MAX_OBJECT)
		flaw(&r, -1, "it", "is longer than 2 MiB");
	else if (j->depth - level >= MAX_DEPTH)
		flaw(&r, -1, "it", "is nested deeper than %d levels", MAX_DEPTH);
	if (!r.bad)
		read_labels(&r);
	if (k == SERVICES && !r.o.blank && !r.bad)
		read_service(&r);
	if (k == SLICES && !r.o.blank && !r.bad)
		read_slice(&r);
	if (k == NODES) {
		read_name(&r, json_get(j, r.labels, "topology.kubernetes.io/zone"), 0);
		keep_text(&r);
	}
	if (k == SERVICE_CIDRS)
		read_cidrs(&r, read_member(&r, at, "spec", JSMN_OBJECT), "cidrs");
	if (r.bad || r.o.blank)
		reader_blank(&r);
	buf_add(&r.fixed, r.texts.at, r.texts.len);
	r.o.size = sizeof(*o) + r.fixed.len;
	o = mem(NULL, r.o.size);
	*o = r.o;
	memcpy(o->at, r.fixed.at, r.fixed.len);
	buf_free(&r.fixed);
	buf_free(&r.texts);
	buf_free(&r.text);
	return o;
}
/* === model (what the cluster has) =========================================
 * Objects; services, their slices, our node; who claims which address; who is
 * dirty. What comes out depends on the set of objects alone, never on their order. */
struct claim {		  /* that an address is a service's */
	struct link link; /* by the address */
	struct service *of;
	struct in6_addr addr;
	uint8_t scope; /* enum tl_scope */
	bool dealt;    /* by --map or --vip-range */
};

/* By namespace and name; also where there are only slices of it yet. */
struct service {
	struct link link;
	struct service *next_dirty;
	struct object *spec; /* NULL: no such Service, or ignored */
	struct object *slices;
	struct claim *claims, *vip; /* an array; one, or NULL */
	struct link taken;	    /* its slot, while VIPs are dealt out */
	void *programmed;	    /* the maps stage's */
	uint32_t n_claims, said;    /* said: a hash of the note about it */
	bool dirty, out; /* in the list; model_next_dirty gave it out and forget is to come */
	bool gone;	 /* nothing of it is to be programmed */
	const char *name;
	char ns[]; /* and the name */
};

#define MAX_BAD 1024 /* further bad objects are said again each time */

struct model { /* all zero, then model_init */
	const struct options *opt;
	struct filter filter;
	struct {
		const char *node, *zone;
	} places; /* ours; "": not known */
	struct table objects, services, claims;
	size_t n_of[N_KINDS]; /* objects that are not blank */
	size_t n_bad;	     /* the others */
	uint64_t cost;	     /* of all objects */
	bool full[N_KINDS];  /* an object of the last list, or since, had no room */
	struct service *dirty;
	bool synced[N_KINDS];
	uint16_t round[N_KINDS];		/* lists that were begun */
	bool unnamed[N_KINDS];		/* the last one had a bad object whose name is not known */
	bool repeated;			/* the last bad object was as bad before: say it once */
	bool ranges_changed;		/* since model_ranges gave them out */
	bool vips_changed;		/* VIPs have to be dealt out anew */
	size_t n_without, said_without; /* services that found the VIP range full */
};

/* 0, or -1 with why: the selector is wrong. */
static int model_init(struct model *m, const struct options *o)
{
	m->opt = o;
	m->filter = (struct filter){ o->selector, o->namespaces, o->n_namespaces };
	m->places.node = o->node ? o->node : "";
	m->places.zone = "";
	m->ranges_changed = true;
	return selector_match(o->selector, &(struct json){ 0 }, -1) < 0 ? -1 : 0;
}

static void model_dirty(struct model *m, struct service *s)
{
	if (s->dirty)
		return;
	s->dirty = true;
	s->next_dirty = m->dirty;
	m->dirty = s;
}

static uint64_t name_hash(const char *ns, const char *name)
{
	return hash64(hash64(0, ns, strlen(ns) + 1), name, strlen(name));
}

static struct service *service_get(struct model *m, const char *ns, const char *name)
{
	uint64_t hash = name_hash(ns, name);
	size_t a = strlen(ns) + 1, b = strlen(name) + 1;
	struct service *s = NULL;

	while ((s = (struct service *)table_next(&m->services, (struct link *)s, hash)))
		if (!strcmp(s->ns, ns) && !strcmp(s->name, name))
			return s;
	s = mem(NULL, sizeof(*s) + a + b);
	memset(s, 0, sizeof(*s));
	memcpy(s->ns, ns, a);
	s->name = memcpy(s->ns + a, name, b);
	table_add(&m->services, &s->link, hash);
	return s;
}

/* Frees what nothing holds any more. */
static void service_drop(struct model *m, struct service *s)
{
	if (s->spec || s->slices || s->dirty || s->out)
		return;
	table_remove(&m->services, &s->link);
	free(s);
}

static int service_by_name(const struct service *a, const struct service *b)
{
	int c = strcmp(a->ns, b->ns);

	return c ? c : strcmp(a->name, b->name);
}

/* Older: by creation, then namespace, then name. */
static bool service_older(const struct service *a, const struct service *b)
{
	if (a->spec->created != b->spec->created)
		return a->spec->created < b->spec->created;
	return service_by_name(a, b) < 0;
}

/* --- claims ---------------------------------------------------------------- */
/* The next claim to an address, behind `at`; the first if that is NULL. */
static struct claim *claim_next(const struct model *m, const struct in6_addr *addr,
				struct claim *at)
{
	uint64_t hash = hash64(0, addr, sizeof(*addr));

	while ((at = (struct claim *)table_next(&m->claims, (struct link *)at, hash)))
		if (!memcmp(&at->addr, addr, sizeof(*addr)))
			break;
	return at;
}

/* Whoever shares what is claimed may have to be resolved anew. */
static void claim_changed(struct model *m, const struct claim *c)
{
	for (struct claim *o = NULL; (o = claim_next(m, &c->addr, o));)
		model_dirty(m, o->of);
}

static void claim_add(struct model *m, struct claim *c)
{
	table_add(&m->claims, &c->link, hash64(0, &c->addr, sizeof(c->addr)));
	claim_changed(m, c);
}

static void claim_remove(struct model *m, struct claim *c)
{
	claim_changed(m, c);
	table_remove(&m->claims, &c->link);
}

/* The range of --vip-range or a --map's FROM that an address of a service's own
 * is in, as text; NULL if it may be served. Before the start that is an error,
 * afterwards the address is left out. */
static const char *claim_refused(const struct model *m, const struct claim *c)
{
	static char text[INET6_ADDRSTRLEN + 20];
	char cidr[INET6_ADDRSTRLEN + 4];

	for (int i = m->opt->has_vip_range ? -1 : 0; i < m->opt->n_maps; i++) {
		const struct cidr *range = i < 0 ? &m->opt->vip_range : &m->opt->maps[i].from;

		if (c->dealt || !c->of->spec->served || !cidr_has(range, &c->addr))
			continue;
		snprintf(text, sizeof(text), "%s %s", i < 0 ? "--vip-range" : "--map",
			 cidr_text(range, cidr));
		return text;
	}
	return NULL;
}

/* Where --map serves an address of TO. */
static struct in6_addr addr_mapped(const struct map_option *map, const struct in6_addr *a)
{
	struct in6_addr net = *a, to = map->from.addr;

	addr_mask(&net, map->to.bits);
	for (int i = 0; i < 16; i++)
		to.s6_addr[i] ^= a->s6_addr[i] ^ net.s6_addr[i];
	return to;
}

static bool spec_restricted(const struct object *spec, bool v4)
{
	for (uint32_t i = 0; i < spec->n_cidrs; i++)
		if (addr_is_v4(&object_cidrs(spec)[i].addr) == v4)
			return true;
	return false;
}

static void claims_build(struct model *m, struct service *s)
{
	struct buf out = { 0 };
	const struct object *spec = s->spec;
	struct claim c = { .of = s, .scope = TL_INTERNAL };
	const struct in6_addr *ip = spec->at, *lb = ip + spec->n_cluster + spec->n_external;
	const struct in6_addr *end = lb + spec->n_lb;

	for (; ip < spec->at + spec->n_cluster; ip++) {
		c.addr = *ip;
		c.dealt = false;
		buf_add(&out, &c, sizeof(c));
		c.dealt = true;
		for (int i = 0; i < m->opt->n_maps; i++)
			if (cidr_has(&m->opt->maps[i].to, ip)) {
				c.addr = addr_mapped(&m->opt->maps[i], ip);
				buf_add(&out, &c, sizeof(c));
			}
	}
	c.dealt = false;
	for (; ip < end && spec->served; ip++) {
		bool v4 = addr_is_v4(ip), limited = false;

		if (!object_cluster_ip(spec, v4))
			continue;
		for (const struct in6_addr *o = lb; o < end && spec_restricted(spec, v4); o++)
			limited |= !memcmp(ip, o, sizeof(*ip));
		c.addr = *ip;
		c.scope = limited ? TL_LOADBALANCER : TL_EXTERNAL;
		buf_add(&out, &c, sizeof(c));
	}
	s->n_claims = out.len / sizeof(c);
	s->claims = out.len ? mem(out.at, out.len) : NULL;
	for (uint32_t i = 0; i < s->n_claims; i++)
		claim_add(m, &s->claims[i]);
}

/* --- VIPs -------------------------------------------------------------------
 * Slots of --vip-range, each with an address. A service's home is a hash of its name. They are
 * dealt out by age: to each the first free slot from its home on. */
static bool vip_wanted(const struct model *m, const struct object *spec)
{
	return spec && m->opt->has_vip_range &&
		object_cluster_ip(spec, addr_is_v4(&m->opt->vip_range.addr));
}

/* A service's VIP becomes this; NULL: it has none. */
static void vip_set(struct model *m, struct service *s, const struct in6_addr *addr)
{
	if (s->vip && addr && !memcmp(&s->vip->addr, addr, sizeof(*addr)))
		return;
	if (s->vip)
		claim_remove(m, s->vip);
	free(s->vip);
	s->vip = NULL;
	if (!addr)
		return;
	s->vip = mem(NULL, sizeof(*s->vip));
	*s->vip = (struct claim){ .of = s, .addr = *addr, .dealt = true };
	claim_add(m, s->vip);
}

static int service_by_age(const void *x, const void *y)
{
	return service_older(*(struct service *const *)x, *(struct service *const *)y) ? -1 : 1;
}

static void vips_deal(struct model *m)
{
	const struct cidr *range = &m->opt->vip_range;
	struct service **all = mem(NULL, m->services.n * sizeof(*all));
	int width = 128 - range->bits;
	/* of IPv4 not the network's and not the broadcast address */
	uint64_t first = addr_is_v4(&range->addr) && width >= 2, slot, at;
	uint64_t room = ((uint64_t)1 << (width < 62 ? width : 62)) - first * 2;
	struct table taken = { 0 };
	size_t n = 0;

	TABLE_EACH (&m->services, l)
		if (vip_wanted(m, ((struct service *)l)->spec))
			all[n++] = (struct service *)l;
	qsort(all, n, sizeof(*all), service_by_age);
	m->n_without = n > room ? n - room : 0;
	for (size_t i = 0; i < n; i++) {
		struct in6_addr addr = range->addr;

		slot = name_hash(all[i]->ns, all[i]->name) % room;
		while (i < room && table_next(&taken, NULL, slot))
			slot = (slot + 1) % room;
		if (i < room)
			table_add(&taken, &all[i]->taken, slot);
		at = slot + first;
		for (int byte = 15; at; byte--, at >>= 8)
			addr.s6_addr[byte] |= at; /* which are zero in the range */
		vip_set(m, all[i], i < room ? &addr : NULL);
	}
	free(taken.bucket);
	free(all);
}

/* --- putting and deleting --------------------------------------------------- */
static void service_change(struct model *m, struct service *s, struct object *new)
{
	bool had = vip_wanted(m, s->spec), wanted = vip_wanted(m, new);

	m->vips_changed |= had != wanted || (had && new->created != s->spec->created);
	if (!wanted)
		vip_set(m, s, NULL);
	for (uint32_t i = 0; i < s->n_claims; i++)
		claim_remove(m, &s->claims[i]);
	free(s->claims);
	s->spec = new;
	s->claims = NULL;
	s->n_claims = 0;
	if (new)
		claims_build(m, s);
	model_dirty(m, s);
}

/* A slice joins its service, or leaves it. */
static void slice_move(struct model *m, struct object *o, bool joins)
{
	struct service *of = service_get(m, object_text(o, 0), object_more(o));
	struct object **at = &of->slices;

	while (!joins && *at != o)
		at = &(*at)->sibling;
	if (joins)
		o->sibling = *at;
	*at = joins ? o : o->sibling;
	model_dirty(m, of);
}

static void zone_change(struct model *m, const char *zone)
{
	if (strcmp(m->places.zone, zone))
		TABLE_EACH (&m->services, l)
			model_dirty(m, (struct service *)l);
	m->places.zone = zone;
}

static uint64_t object_hash(const struct object *o)
{
	return name_hash(object_text(o, 0), object_name(o)) + o->kind;
}

static struct object *object_find(const struct model *m, const struct object *like)
{
	uint64_t hash = object_hash(like);
	struct object *o = NULL;

	while ((o = (struct object *)table_next(&m->objects, (struct link *)o, hash)))
		if (o->kind == like->kind && !strcmp(object_text(o, 0), object_text(like, 0)) &&
		    !strcmp(object_name(o), object_name(like)))
			break;
	return o;
}

/* `old` goes, `new` comes; either may be NULL. */
static void model_replace(struct model *m, struct object *old, struct object *new)
{
	enum kind k = (old ? old : new)->kind;
	struct object *was = old && !old->blank ? old : NULL;
	struct object *is = new && !new->blank ? new : NULL, *any = is ? is : was;

	if (new)
		table_add(&m->objects, &new->link, object_hash(new));
	if (k == SERVICES && any)
		service_change(m, service_get(m, object_text(any, 0), object_name(any)), is);
	if (k == SLICES && was)
		slice_move(m, was, false);
	if (k == SLICES && is)
		slice_move(m, is, true);
	if (k == NODES && any)
		zone_change(m, is ? object_more(is) : "");
	m->ranges_changed |= any && k == SERVICE_CIDRS;
	m->n_of[k] += !!is - !!was;
	m->cost += (new ? object_cost(new) : 0) - (old ? object_cost(old) : 0);
	m->n_bad += (new && !is) - (old && !was);
	if (old)
		table_remove(&m->objects, &old->link);
	free(old);
}

/* Takes what object_read made: 0, or -1 with why. Of a bad object, or one that would make
 * the model cost more than `most`, the last good state stays, through a relist too; a bad
 * one is remembered even if there is none. */
static int model_store(struct model *m, struct object *o, uint64_t most)
{
	const size_t from = offsetof(struct object, size);
	struct object *old = object_find(m, o);
	bool same = old && old->size == o->size &&
		!memcmp((char *)old + from, (char *)o + from, o->size - from);
	int got = o->bad ? -1 : 0;

	o->blank |= o->kind == NODES && strcmp(object_name(o), m->places.node);
	o->round = m->round[o->kind];
	m->repeated = old && o->bad && old->bad == o->bad;
	m->unnamed[o->kind] |= o->unnamed;
	if (old) {
		old->round = o->round;
		old->bad = o->bad;
	}
	if (!o->blank && m->cost + object_cost(o) - (old ? object_cost(old) : 0) > most) {
		got = fail("%s %s%s%.400s has no room: what is known of all objects takes %u MiB; it and "
			   "further ones are left out, or stay as they were", kinds[o->kind].name,
			   object_text(o, 0), kinds[o->kind].namespaced ? "/" : "", object_name(o),
			   MAX_MODEL >> 20);
		m->repeated = m->full[o->kind];
		m->full[o->kind] = true;
		free(o);
	} else if (!old && (!o->blank || (o->bad && m->n_bad < MAX_BAD))) {
		model_replace(m, NULL, o);
	} else if (old && !o->blank && !same) {
		model_replace(m, old, o);
	} else {
		if (old && o->blank && !o->bad)
			model_replace(m, old, NULL);
		free(o);
	}
	return got;
}

/* 0; or -1 with why, naming kind, namespace/name and field: the object is bad, or too much,
 * its last good state stays. A text that json_parse refused comes here too, if
 * its stream is sound: what stands of it names it. */
static int model_put(struct model *m, enum kind k, const struct json *j, int at)
{
	return model_store(m, object_read(&m->filter, k, j, at), MAX_MODEL);
}

static void model_delete(struct model *m, enum kind k, const struct json *j, int at)
{
	struct object *o = object_read(&m->filter, k, j, at);

	o->blank = true; /* it is as if it were ignored from now on */
	o->bad = 0;
	o->unnamed = false;
	model_store(m, o, MAX_MODEL);
}

/* A list begins. */
static void model_mark(struct model *m, enum kind k)
{
	m->round[k]++;
	m->unnamed[k] = m->full[k] = false;
}

/* It is complete: what it did not bring goes, unless something in it could not
 * be named, which may be any of those. */
static void model_sweep(struct model *m, enum kind k)
{
	m->synced[k] = true;
	if (m->unnamed[k])
		return;
	TABLE_EACH (&m->objects, l) {
		struct object *o = (struct object *)l;

		if (o->kind == k && o->round != m->round[k])
			model_replace(m, o, NULL);
	}
}

static int service_order(const void *a, const void *b)
{
	return service_by_name(*(struct service *const *)a, *(struct service *const *)b);
}

/* The services that are served, by namespace and name; to be freed. */
static struct service **model_sorted(struct model *m, size_t *n)
{
	struct service **all = mem(NULL, m->services.n * sizeof(*all));

	*n = 0;
	TABLE_EACH (&m->services, l)
		if (((struct service *)l)->spec && ((struct service *)l)->spec->served)
			all[(*n)++] = (struct service *)l;
	qsort(all, *n, sizeof(*all), service_order);
	return all;
}

/* Once, when the first lists are complete and before model_settle: do --vip-range
 * and --map hit addresses that are in use, or each other? 0, or -1 with why. */
static int model_check(struct model *m)
{
	const struct options *o = m->opt;
	char text[INET6_ADDRSTRLEN + 4], other[INET6_ADDRSTRLEN + 4];
	struct service **all;
	size_t n;
	int got = 0;

	for (int i = 0; i < o->n_maps; i++)
		for (int k = o->has_vip_range ? -1 : 0; k < i; k++) {
			const struct map_option *a = &o->maps[i], *b = &o->maps[k];
			const struct cidr *range = k < 0 ? &o->vip_range : &b->from;
			bool same = k >= 0 && !cidr_order(&a->from, &b->from) &&
				!cidr_order(&a->to, &b->to);

			if (cidr_overlap(&a->from, range) && !same)
				return fail(
					"--map %s and --%s %s overlap: choose ranges of their own",
					cidr_text(&a->from, text), k < 0 ? "vip-range" : "map",
					cidr_text(range, other));
		}
	all = model_sorted(m, &n);
	for (size_t i = 0; i < n && !got; i++)
		for (uint32_t k = 0; k < all[i]->n_claims && !got; k++) {
			const struct claim *c = &all[i]->claims[k];
			const char *range = claim_refused(m, c);

			if (range)
				got = fail("%s contains %s, an address of Service %s/%s: choose "
					   "another range",
					   range, addr_text(&c->addr, text), all[i]->ns,
					   all[i]->name);
		}
	free(all);
	return got;
}

/* Call before model_next_dirty: does and says what concerns them all. */
static void model_settle(struct model *m)
{
	char text[INET6_ADDRSTRLEN + 4];

	if (m->vips_changed)
		vips_deal(m);
	m->vips_changed = false;
	if (m->n_without && m->n_without != m->said_without)
		note("--vip-range %s is full: the %zu youngest services have no address in it",
		     cidr_text(&m->opt->vip_range, text), m->n_without);
	m->said_without = m->n_without;
}

/* All ranges that services have their addresses from: struct cidr, to be freed; with the
 * ServiceCIDRs if `all`. */
static struct buf model_ranges_of(const struct model *m, bool all)
{
	struct buf out = { 0 };

	if (m->opt->has_vip_range)
		buf_add(&out, &m->opt->vip_range, sizeof(struct cidr));
	for (int i = 0; i < m->opt->n_maps; i++)
		buf_add(&out, &m->opt->maps[i].from, sizeof(struct cidr));
	TABLE_EACH (&m->objects, l) {
		const struct object *o = (struct object *)l;

		if (o->kind == SERVICE_CIDRS && all)
			buf_add(&out, object_cidrs(o), o->n_cidrs * sizeof(struct cidr));
	}
	return out;
}

/* The ranges that are ours whatever stands in them (rule 16). Where services are left
 * out, a ServiceCIDR may hold some that others serve. */
static struct buf model_ranges(struct model *m)
{
	const char *selector = m->filter.selector ? m->filter.selector : "";

	m->ranges_changed = false;
	return model_ranges_of(m, !m->filter.n_namespaces && !selector[strspn(selector, SELECTOR_SPACE)]);
}

/* The next service whose entries may differ from what they were, each once;
 * NULL: none left. One with ->gone resolves to nothing and is to be given to
 * model_forget. */
static struct service *model_next_dirty(struct model *m)
{
	struct service *s;

	while ((s = m->dirty)) {
		m->dirty = s->next_dirty;
		s->dirty = false;
		s->gone = !s->spec || !s->spec->served;
		if (!s->gone || s->out) {
			s->out = true;
			return s;
		}
		service_drop(m, s);
	}
	return NULL;
}

/* Nothing is programmed for a gone service any more. */
static void model_forget(struct model *m, struct service *s)
{
	s->out = false;
	service_drop(m, s);
}
/* === resolve (a service into what is programmed) ==========================
 * kube-proxy's rules, one function each. Everything returned lives in buffers
 * that the next call uses again. */
struct backend {
	struct in6_addr addr;
	uint16_t port;
	bool local;
	const char *node; /* "" if none */
};

struct frontend {
	struct in6_addr addr;
	uint16_t port;
};

struct entry { /* one service port in one family and one scope */
	const char *ns, *name, *port;
	uint8_t proto; /* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP */
	bool v4;
	enum tl_scope scope;
	bool drop_if_empty;
	uint32_t affinity;	    /* seconds, 0: none */
	struct frontend *frontends; /* sorted by address and port, unique */
	struct cidr *sources;	    /* of scope TL_LOADBALANCER; likewise */
	struct backend *backends;   /* likewise */
	struct backend *serving;    /* a UDP flow to one of these is not flushed (rule 17) */
	int n_frontends, n_sources, n_backends, n_serving;
	/* for --status: of the flows there are; [0] from clients, [1] to them */
	uint64_t flows, packets[2], bytes[2];
};

/* An endpoint of one service port; of those with one address and port the
 * first counts. */
struct candidate {
	struct backend backend;
	uint8_t conditions, place; /* enum place_flags */
	const char *slice;
	uint32_t index;
};

enum place_flags {
	PLACE_LOCAL = 1,
	PLACE_ZONE_HINTS = 2,
	PLACE_OUR_ZONE = 4, /* one of them is ours */
	PLACE_NODE_HINTS = 8,
	PLACE_OUR_NODE = 16,
};

struct resolved {
	struct entry *entries;
	int n;
	/* inside; of the entries: frontends and sources; backends and serving */
	struct buf list, fronts, backs, candidates;
	struct buf lost; /* what is not as the service asks for, "; " behind each */
};

/* The endpoint at `at` in a slice; the next one's place. */
static const char *candidate_read(const struct model *m, const struct object *s, const char *at,
				  struct candidate *c)
{
	const char *node = m->places.node, *zone = m->places.zone;
	bool hints = *at & ENDPOINT_HINTS;

	c->conditions = *at++ & ~ENDPOINT_HINTS;
	c->backend.addr = (struct in6_addr){ .s6_addr = { [10] = 0xff, 0xff } };
	memcpy(c->backend.addr.s6_addr + (s->v4 ? 12 : 0), at, s->v4 ? 4 : 16);
	at += s->v4 ? 4 : 16;
	c->backend.node = at;
	c->backend.local = *node && !strcmp(at, node);
	c->place = c->backend.local ? PLACE_LOCAL : 0;
	for (at = text_after(at); hints && *at; at = text_after(at))
		if (*at == 'n')
			c->place |= PLACE_NODE_HINTS |
				(*node && !strcmp(at + 1, node) ? PLACE_OUR_NODE : 0);
		else
			c->place |= PLACE_ZONE_HINTS |
				(*zone && !strcmp(at + 1, zone) ? PLACE_OUR_ZONE : 0);
	return at + hints;
}

static int candidate_order(const void *x, const void *y)
{
	const struct candidate *a = x, *b = y;
	int c = memcmp(&a->backend.addr, &b->backend.addr, sizeof(a->backend.addr));

	c = c ? c : a->backend.port - b->backend.port;
	c = c ? c : a->conditions - b->conditions;
	c = c ? c : strcmp(a->slice, b->slice);
	return c ? c : a->index < b->index ? -1 : a->index > b->index;
}

/* Rules 3 to 6: the endpoints of one port in one family, sorted, unique. */
static int resolve_candidates(const struct model *m, struct service *s, const struct port *p,
			      bool v4, struct resolved *r)
{
	const char *name = object_text(s->spec, p->name);
	bool sctp_left = false;
	struct candidate *all;
	int n, kept = 0;

	r->candidates.len = 0;
	for (struct object *sl = s->slices; sl; sl = sl->sibling) {
		const struct port *q = object_ports(sl), *end = q + sl->n_ports;

		for (; q < end && sl->v4 == v4; q++) {
			const char *at = text_after(object_more(sl));
			struct candidate c = { .slice = object_name(sl) };
			bool left = q->proto == IPPROTO_SCTP && q->number != p->number;

			if (q->proto != p->proto || strcmp(object_text(sl, q->name), name))
				continue;
			sctp_left |= left && sl->n_endpoints;
			c.backend.port = q->number;
			for (; c.index < sl->n_endpoints && !left; c.index++) {
				at = candidate_read(m, sl, at, &c);
				buf_add(&r->candidates, &c, sizeof(c));
			}
		}
	}
	if (sctp_left)
		buf_printf(&r->lost, "port \"%s\": SCTP endpoints with another port number; ",
			   name);
	all = (struct candidate *)r->candidates.at;
	n = r->candidates.len / sizeof(*all);
	if (n)
		qsort(all, n, sizeof(*all), candidate_order);
	for (int i = 0; i < n; i++)
		if (!i || addr_order(&all[i].backend.addr, &all[kept - 1].backend.addr) ||
		    all[i].backend.port != all[kept - 1].backend.port)
			all[kept++] = all[i];
	return kept;
}

static bool candidate_ready(const struct candidate *c)
{
	return !(c->conditions & ENDPOINT_NOT_READY);
}

static bool candidate_fallback(const struct candidate *c)
{
	return (c->conditions & (ENDPOINT_NOT_SERVING | ENDPOINT_TERMINATING)) ==
		ENDPOINT_TERMINATING;
}

/* Rule 9: which place flag a ready endpoint must have; 0: none, all serve. */
static int resolve_topology(const struct candidate *c, int n)
{
	int all = PLACE_NODE_HINTS | PLACE_ZONE_HINTS, any = 0;

	for (int i = 0; i < n; i++)
		if (candidate_ready(&c[i])) {
			all &= c[i].place;
			any |= c[i].place;
		}
	if (all & PLACE_NODE_HINTS && any & PLACE_OUR_NODE)
		return PLACE_OUR_NODE;
	return all & PLACE_ZONE_HINTS && any & PLACE_OUR_ZONE ? PLACE_OUR_ZONE : 0;
}

/* Rules 7 and 8: the backends under a policy; how many. */
static int resolve_backends(struct resolved *r, int n, bool local)
{
	const struct candidate *c = (struct candidate *)r->candidates.at;
	int place = local ? PLACE_LOCAL : resolve_topology(c, n), found = 0;

	for (int fallback = 0; fallback < 2 && !found; fallback++) {
		for (int i = 0; i < n; i++)
			if ((fallback ? candidate_fallback(&c[i]) : candidate_ready(&c[i])) &&
			    (c[i].place & place) == place) {
				buf_add(&r->backs, &c[i].backend, sizeof(c[i].backend));
				found++;
			}
		place &= PLACE_LOCAL;
	}
	return found;
}

/* Who has a frontend instead of the claim's service; that itself: as another
 * frontend; NULL: nobody. */
static struct service *resolve_owner(struct model *m, const struct claim *mine,
				     const struct port *p)
{
	struct service *s = mine->of;
	bool own = mine->scope == TL_INTERNAL;

	if (object_port(s->spec, p) != p)
		return s;
	for (struct claim *c = NULL; (c = claim_next(m, &mine->addr, c));) {
		bool owns = c->scope == TL_INTERNAL;

		if (claim_refused(m, c))
			continue;
		if (owns && !own)
			return c->of;
		if (owns == own && c->of != s && c->of->spec->served && service_older(c->of, s) &&
		    object_port(c->of->spec, p))
			return c->of;
	}
	return NULL;
}

/* A claimed address as frontend of a port, unless it is not to be served. */
static void resolve_frontend(struct model *m, const struct claim *c, const struct port *p,
			     struct resolved *r)
{
	struct frontend f = { .addr = c->addr, .port = p->number };
	const char *range = claim_refused(m, c);
	struct service *owner;
	char text[INET6_ADDRSTRLEN];

	if (range) {
		buf_printf(&r->lost, "%s, in %s; ", addr_text(&c->addr, text), range);
		return;
	}
	owner = resolve_owner(m, c, p);
	if (!owner)
		buf_add(&r->fronts, &f, sizeof(f));
	else if (owner != c->of)
		buf_printf(&r->lost, "%s port %u/%s, which belongs to Service %s/%s; ",
			   addr_text(&c->addr, text), p->number, proto_name(p->proto), owner->ns,
			   owner->name);
}

/* Sorts what was added to a buffer from `at` on, each once; how many. */
static int buf_unique(struct buf *b, size_t at, size_t size,
		      int (*order)(const void *, const void *))
{
	int n = (b->len - at) / size, kept = 0;
	char *p = b->at + at;

	if (n)
		qsort(p, n, size, order);
	for (int i = 0; i < n; i++)
		if (!i || order(p + i * size, p + (kept - 1) * size))
			memmove(p + kept++ * size, p + i * size, size);
	b->len = at + kept * size;
	return kept;
}

static void resolve_entry(struct model *m, struct service *s, const struct port *p, bool v4,
			  enum tl_scope scope, int candidates, struct resolved *r)
{
	const struct candidate *c = (struct candidate *)r->candidates.at;
	const struct cidr *sources = object_cidrs(s->spec);
	bool local = scope == TL_INTERNAL ? s->spec->internal_local : s->spec->external_local;
	struct entry e = { .ns = s->ns,
			   .name = s->name,
			   .port = object_text(s->spec, p->name),
			   .proto = p->proto,
			   .v4 = v4,
			   .scope = scope,
			   .affinity = s->spec->affinity };
	size_t at = r->fronts.len;

	for (uint32_t i = 0; i <= s->n_claims; i++) {
		const struct claim *claim = i < s->n_claims ? &s->claims[i] : s->vip;

		if (claim && claim->scope == scope && addr_is_v4(&claim->addr) == v4)
			resolve_frontend(m, claim, p, r);
	}
	e.n_frontends = buf_unique(&r->fronts, at, sizeof(*e.frontends), addr_order);
	if (!e.n_frontends && scope != TL_INTERNAL)
		return;
	at = r->fronts.len;
	for (uint32_t i = 0; i < s->spec->n_cidrs && scope == TL_LOADBALANCER; i++)
		if (addr_is_v4(&sources[i].addr) == v4)
			buf_add(&r->fronts, &sources[i], sizeof(*e.sources));
	e.n_sources = buf_unique(&r->fronts, at, sizeof(*e.sources), cidr_order);
	e.n_backends = resolve_backends(r, candidates, local);
	for (int i = 0; i < candidates; i++) {
		bool ready = candidate_ready(&c[i]);

		e.drop_if_empty |=
			local && !c[i].backend.local && (ready || candidate_fallback(&c[i]));
		/* ready alone: publishNotReadyAddresses */
		if (ready || !(c[i].conditions & ENDPOINT_NOT_SERVING)) {
			buf_add(&r->backs, &c[i].backend, sizeof(*e.serving));
			e.n_serving++;
		}
	}
	buf_add(&r->list, &e, sizeof(e));
}

/* The entries of a service, sorted as CONTRACT says. What is not as it asks for is
 * said, unless it was said before. */
static void resolve_service(struct model *m, struct service *s, struct resolved *r)
{
	struct object *spec = s->spec && s->spec->served ? s->spec : NULL;
	uint32_t said = 0;
	char *fronts;
	struct backend *backs;

	r->fronts.len = r->backs.len = r->list.len = r->lost.len = 0;
	for (uint32_t i = 0; spec && i < spec->n_ports; i++)
		for (int v4 = 1; v4 >= 0; v4--) {
			const struct port *p = &object_ports(spec)[i];
			int n;

			if (!object_cluster_ip(spec, v4))
				continue;
			n = resolve_candidates(m, s, p, v4, r);
			for (enum tl_scope scope = TL_INTERNAL; scope <= TL_LOADBALANCER; scope++)
				resolve_entry(m, s, p, v4, scope, n, r);
		}
	if (r->lost.len)
		said = hash64(0, r->lost.at, r->lost.len);
	if (said && said != s->said)
		note("Service %s/%s: not served: %.*s%s", s->ns, s->name,
		     r->lost.len < 400 ? (int)r->lost.len - 2 : 400, r->lost.at,
		     r->lost.len < 400 ? "" : "...");
	s->said = said;
	r->entries = (struct entry *)r->list.at;
	r->n = r->list.len / sizeof(*r->entries);
	fronts = r->fronts.at;
	backs = (struct backend *)r->backs.at;
	for (struct entry *e = r->entries; e < r->entries + r->n; e++) {
		e->frontends = (struct frontend *)fronts;
		e->sources = (struct cidr *)(e->frontends + e->n_frontends);
		fronts = (char *)(e->sources + e->n_sources);
		e->backends = backs;
		e->serving = e->backends + e->n_backends;
		backs = e->serving + e->n_serving;
	}
}
/* === printing ============================================================= */
static void print_string(struct buf *out, const char *s)
{
	buf_add(out, "\"", 1);
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			buf_printf(out, "\\%c", *s);
		else if ((unsigned char)*s < ' ')
			buf_printf(out, "\\u%04x", *s);
		else
			buf_add(out, s, 1);
	buf_add(out, "\"", 1);
}

/* `before`, then ADDR:PORT or [ADDR]:PORT. */
static void print_socket(struct buf *out, const char *before, const struct in6_addr *a,
			 uint16_t port)
{
	char text[INET6_ADDRSTRLEN];

	buf_printf(out, addr_is_v4(a) ? "%s%s:%u" : "%s[%s]:%u", before, addr_text(a, text), port);
}

static const char *const scope_names[] = { "internal", "external", "load-balancer" };

/* Objects with commas between them, one a line; `first`: none were before. */
static void print_entries_json(struct buf *out, const struct entry *e, int n, bool first)
{
	char text[INET6_ADDRSTRLEN + 4];

	for (; n--; e++, first = false) {
		buf_printf(out, "%s\n {\"namespace\":", first ? "" : ",");
		print_string(out, e->ns);
		buf_printf(out, ",\"name\":");
		print_string(out, e->name);
		buf_printf(out, ",\"port\":");
		print_string(out, e->port);
		buf_printf(out, ",\"protocol\":\"%s\",\"family\":\"IPv%d\",\"scope\":\"%s\"",
			   proto_name(e->proto), e->v4 ? 4 : 6, scope_names[e->scope]);
		buf_printf(out, ",\"frontends\":[");
		for (int i = 0; i < e->n_frontends; i++) {
			const struct frontend *f = &e->frontends[i];

			print_socket(out, i ? ",\"" : "\"", &f->addr, f->port);
			buf_printf(out, "\"");
		}
		buf_printf(out, "],\"backends\":[");
		for (int i = 0; i < e->n_backends; i++) {
			const struct backend *b = &e->backends[i];

			print_socket(out, i ? ",{\"address\":\"" : "{\"address\":\"", &b->addr,
				     b->port);
			buf_printf(out, "\",\"node\":");
			print_string(out, b->node);
			buf_printf(out, ",\"local\":%s}", b->local ? "true" : "false");
		}
		for (int i = 0; i < e->n_sources; i++)
			buf_printf(out, "%s\"%s\"", i ? "," : "],\"sources\":[",
				   cidr_text(&e->sources[i], text));
		buf_printf(out, "],\"empty\":\"%s\",\"affinity_seconds\":%" PRIu32 "}",
			   e->drop_if_empty ? "drop" : "reject", e->affinity);
	}
}

/* For people, as `wg show`. */
/* "1.21 MiB" */
static void print_size(struct buf *out, const char *before, uint64_t bytes)
{
	static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB" };
	double size = bytes;
	int unit = 0;

	for (; size >= 1024 && unit < 4; unit++)
		size /= 1024;
	buf_printf(out, unit ? "%s%.2f %s" : "%s%.0f %s", before, size, units[unit]);
}

static void print_entries_text(struct buf *out, const struct entry *e, int n)
{
	char text[INET6_ADDRSTRLEN + 4];

	for (; n--; e++) {
		buf_printf(out, "\nservice: %s/%s%s%s %s %s\n  frontends: %s", e->ns, e->name,
			   *e->port ? " " : "", e->port, proto_name(e->proto),
			   scope_names[e->scope], e->n_frontends ? "" : "(none)");
		for (int i = 0; i < e->n_frontends; i++)
			print_socket(out, i ? ", " : "", &e->frontends[i].addr,
				     e->frontends[i].port);
		for (int i = 0; i < e->n_sources; i++)
			buf_printf(out, "%s%s", i ? ", " : "\n  allowed from: ",
				   cidr_text(&e->sources[i], text));
		for (int i = 0; i < e->n_backends; i++) {
			const struct backend *b = &e->backends[i];

			print_socket(out, i ? "\n            " : "\n  backends: ", &b->addr,
				     b->port);
			if (*b->node)
				buf_printf(out, " on %s%s", b->node, b->local ? " (here)" : "");
		}
		if (!e->n_backends)
			buf_printf(out, "\n  backends: (none), new flows are %s",
				   e->drop_if_empty ? "dropped" : "rejected");
		if (e->affinity)
			buf_printf(out, "\n  affinity: %" PRIu32 " seconds", e->affinity);
		if (e->flows)
			buf_printf(out, "\n  flows: %" PRIu64, e->flows);
		for (int way = 0; way < 2 && e->flows; way++) {
			print_size(out, way ? ", " : "\n  transfer: ", e->bytes[way]);
			buf_printf(out, " in %" PRIu64 " packets %s clients", e->packets[way],
				   way ? "to" : "from");
		}
		buf_printf(out, "\n");
	}
}

/* What --dry-run prints. */
static void print_dry_run(struct buf *out, struct model *m, bool json)
{
	const char *node = m->places.node, *zone = m->places.zone;
	static struct resolved r;
	struct service **all;
	bool first = true;
	size_t n;

	if (json) {
		buf_printf(out, "{\"node\":");
		print_string(out, node);
		buf_printf(out, ",\"zone\":");
		print_string(out, zone);
		buf_printf(out, ",\"services\":[");
	} else {
		buf_printf(out, "node: %s\nzone: %s\n", node, *zone ? zone : "(none)");
	}
	all = model_sorted(m, &n);
	for (size_t i = 0; i < n; i++) {
		resolve_service(m, all[i], &r);
		if (json)
			print_entries_json(out, r.entries, r.n, first);
		else
			print_entries_text(out, r.entries, r.n);
		first &= !r.n;
	}
	buf_printf(out, json ? "]}\n" : "");
	free(all);
}
/* === --from ================================================================
 * Objects from a file, read once from its beginning to its end, so that it may
 * be a pipe. Nothing reaches the model before all of it is found good. */
struct from {
	struct model *m;
	struct split split;
	struct json head, item;
	struct buf got;		/* struct object *: the good ones, in their order */
	size_t before;		/* got.len before the list at hand */
	uint64_t cost;		/* of all that was got */
	size_t n_seen;		/* objects and items so far, to name one by its place */
	unsigned list;		/* which "items" of it the others are from */
	struct buf kindless;	/* its items that do not say all of what they are */
	char flaw[sizeof(why)]; /* the first among its items: it counts if it is a List */
};

/* The kind that a list's items need not give; "": they need one; NULL: no list. */
static const char *from_list(const struct json *j)
{
	static const char *const of[] = { "",	  "Service",	   "EndpointSlice",
					  "Node", "NetworkPolicy", "ServiceCIDR" };
	char list[32];

	for (size_t i = 0; i < ARRAY_SIZE(of); i++) {
		snprintf(list, sizeof(list), "%sList", of[i]);
		if (json_eq(j, json_get(j, 0, "kind"), list))
			return of[i];
	}
	return NULL;
}

/* Takes an object, if its kind is one we read. What it does not say itself the
 * list says, if it is of one `kind`: that, and perhaps apiVersion. */
static int from_object(struct from *f, const struct json *j, const char *kind)
{
	int own = json_get(j, 0, "kind"), api = json_get(j, 0, "apiVersion");
	int of = json_get(&f->head, 0, "apiVersion");
	struct object *o;
	enum kind k;

	if (!json_is(j, 0, JSMN_OBJECT))
		return fail("object %zu is no JSON object", f->n_seen);
	if (own < 0 ? !*kind && !j->flaw : !json_is(j, own, JSMN_STRING) || json_eq(j, own, ""))
		return fail("object %zu: kind must be given, as a string", f->n_seen);
	if (api >= 0 && !json_is(j, api, JSMN_STRING))
		return fail("object %zu: apiVersion must be a string", f->n_seen);
	for (k = 0; k < N_KINDS; k++)
		if ((own < 0 ? !strcmp(kind, kinds[k].name) : json_eq(j, own, kinds[k].name)) &&
		    (api >= 0 ? json_eq(j, api, kinds[k].api) :
				*kind && (of < 0 || json_eq(&f->head, of, kinds[k].api))))
			break;
	if (k == N_KINDS)
		return j->flaw ? fail("object %zu %s", f->n_seen, j->flaw) : 0;
	o = object_read(&f->m->filter, k, j, 0);
	buf_add(&f->got, &o, sizeof(o));
	f->cost += object_cost(o);
	if (f->cost > MAX_MODEL && !o->bad)
		return fail("more objects than have room in %u MiB", MAX_MODEL >> 20);
	if (o->bad && o->unnamed)
		fail("object %zu: %s", f->n_seen, why);
	return o->bad ? -1 : 0;
}

/* Ends what came from got.len `keep` on: to the model, or not. */
static void from_give(struct from *f, size_t keep, bool good)
{
	for (size_t i = keep; i < f->got.len; i += sizeof(struct object *)) {
		struct object *o = *(struct object **)(f->got.at + i);

		if (good)
			model_store(f->m, o, UINT64_MAX); /* while the old ones are there too */
		else
			free(o);
	}
	f->got.len = keep;
}

/* The items so far do not count. */
static void from_forget(struct from *f)
{
	from_give(f, f->before, false);
	f->kindless.len = 0;
	f->flaw[0] = 0;
}

/* An element of an "items": what it is in is not known yet. */
static void from_item(struct from *f)
{
	const struct split *s = &f->split;
	struct json *j = &f->item;

	if (f->list != s->n_lists)
		from_forget(f);
	f->list = s->n_lists;
	if (f->flaw[0])
		return;
	json_take(j, s);
	if (from_list(j))
		fail("object %zu is a List in a List", f->n_seen);
	else if (json_is(j, 0, JSMN_OBJECT) && !j->flaw &&
		 (json_get(j, 0, "kind") < 0 || json_get(j, 0, "apiVersion") < 0)) {
		buf_add(&f->kindless, s->text, s->len);
		return;
	} else if (!from_object(f, j, ""))
		return;
	memcpy(f->flaw, why, sizeof(why));
}

/* The object around them, or one that has none. */
static int from_head(struct from *f)
{
	struct split again = { .shape = SPLIT_EVENTS };
	struct json *j = &f->head;
	const char *kind, *at = f->kindless.at;
	size_t n = f->kindless.len;
	int items, bad = 0;

	json_take(j, &f->split);
	kind = from_list(j);
	if (!kind && f->split.size > MAX_OBJECT)
		j->flaw = "is longer than 2 MiB";
	items = json_get(j, 0, "items");
	if (!kind || items < 0 || f->list != f->split.n_lists) {
		from_forget(f);
		n = 0;
	}
	f->list = 0;
	if (!kind)
		return from_object(f, j, "");
	if (j->flaw || (items >= 0 && !json_is(j, items, JSMN_ARRAY)))
		return fail("%sList: %s", kind, j->flaw ? j->flaw : "items must be an array");
	if (f->flaw[0])
		return fail("%s", f->flaw);
	while (n && !bad && split_feed(&again, &at, &n) == SPLIT_ITEM)
		bad = json_take(&f->item, &again) || from_object(f, &f->item, kind);
	split_free(&again);
	return -bad;
}

static int from_stream(struct from *f, FILE *in)
{
	char bytes[16384];
	enum split_got got;
	bool first = true;
	size_t n;

	for (; (n = fread(bytes, 1, sizeof(bytes), in)) > 0; first = false) {
		size_t mark = first && n >= 3 && !memcmp(bytes, "\xef\xbb\xbf", 3) ? 3 : 0;
		const char *at = bytes + mark;

		n -= mark;
		while ((got = split_feed(&f->split, &at, &n)) != SPLIT_MORE) {
			f->n_seen++;
			if (got == SPLIT_ITEM) {
				from_item(f);
				continue;
			}
			if (got == SPLIT_BAD || from_head(f))
				return -1;
			f->head.n_tok = 0; /* its text goes */
			f->kindless.len = 0;
			f->before = f->got.len;
		}
	}
	if (ferror(in))
		return fail("%s", strerror(errno));
	if (!split_idle(&f->split))
		return fail("ends in the middle of an object");
	return f->n_seen ? 0 : fail("no Kubernetes object in it");
}

/* Makes the model what a file says ("-": stdin). 0, or -1 with why, and the
 * model as it was. */
static int from_read(struct model *m, const char *file)
{
	struct from f = { .m = m, .split.shape = SPLIT_LIST };
	FILE *in = strcmp(file, "-") ? fopen(file, "re") : stdin;
	int got = in ? from_stream(&f, in) : fail("%s", strerror(errno));

	if (in && in != stdin)
		fclose(in);
	for (enum kind k = 0; k < N_KINDS && !got; k++)
		model_mark(m, k);
	from_give(&f, 0, !got);
	for (enum kind k = 0; k < N_KINDS && !got; k++)
		model_sweep(m, k);
	free(f.head.tok);
	free(f.item.tok);
	buf_free(&f.got);
	buf_free(&f.kindless);
	split_free(&f.split);
	return got ? fail("%s: %s", strcmp(file, "-") ? file : "stdin", why) : 0;
}
/* === maps (entries into the datapath) =====================================
 * What a service has in the maps is remembered as a sorted list of elements, a map
 * and a key each. To program it anew: write all its elements, what is pointed at
 * before what points; then drop those of the old list that the new one lacks. A set
 * of backends is named by a hash of its contents, so it never changes, and the switch
 * from one to the next is the write of one svc_map value. */
enum map { TEXT_MAP, NET_MAP, SET_MAP, SVC_MAP, CT_MAP, STAT_MAP, AGENT_MAP, DOOR_MAP, N_MAPS };

static const char *const map_names[N_MAPS] = { "text_map", "net_map",  "set_map",  "svc_map",
					       "ct_map",   "stat_map", "agent_map", "door_map" };

#define KEY_MOST    28	  /* bytes of the longest key below */
#define MAX_PLACES  16384 /* networks of pods; a node has one or two */
#define MAX_NAMES   16384 /* pieces of nodes' names, which no server shall fill text_map with; Kubernetes is made for 5,000 nodes */
#define SET_GRACE   1000  /* ms; the datapath holds on to a set for microseconds */
#define SWEEP_LEAST 60000 /* ms from one sweep of ct_map to the next */
#define SWEEP_GRACE 5	  /* seconds that a flow may be over before it is deleted */
#define WRITE_AGAIN 30000 /* ms until what a map did not take is tried again, */
#define WRITE_SOON  1000  /* and for the first time */

struct element {
	uint8_t map, zero[3];
	union {
		char bytes[KEY_MOST];  /* first: an initializer zeroes all of it */
		struct tl_svc_key svc; /* port 0: an address */
		struct tl_set_key set;
		struct tl_text_key text;
		struct tl_net_key net;
	};
} __attribute__((packed, aligned(4))); /* compared as bytes */

_Static_assert(sizeof(struct tl_net_key) == KEY_MOST, "the longest key");

/* struct service's `programmed`. */
struct programmed {
	uint64_t udp; /* a hash of what its UDP flows may be bound to */
	uint32_t n;
	bool failed; /* a map did not take all of it */
	struct element at[];
};

/* How many hold an element: services an address, backends the name of their node.
 * Those names are not in the services' lists, and stay until the next start: they are few, and
 * of nodes beyond MAX_NAMES backends are shown without. */
struct shared {
	struct link link;
	struct element element;
	uint64_t holders;
};

/* A set that its service let go of: a packet may still be looking at it. */
struct dying {
	struct tl_set_key set; /* 0: it lives again */
	int64_t at;
};

/* Descriptors of the pinned maps, and what is remembered of their contents. */
static struct maps {
	int fd[N_MAPS];
	struct table shared;
	int names; /* of nodes, in pieces */
	struct buf dying; /* struct dying, in the order of their ends */
	struct buf ranges; /* elements of net_map that are no service's; sorted */
	bool ranges_failed; /* to be written again at again_at */
	struct table places; /* struct place */
	bool places_changed;
	int64_t again_at; /* when what `failed` is written again; INT64_MAX: nothing did */
	int64_t sweep_at;     /* flows_sweep: not before */
	int64_t sweep_due;    /* when the next of the flows is over that it has seen */
	uint64_t flows_begun; /* TL_FLOW_NEW then */
	uint64_t flows;	      /* and how many there were */
	struct buf udp;	  /* uint64_t: what maps_flush_udp may keep, see udp_mark */
	bool udp_changed;
	bool adopted; /* the first sync is done: nothing unknown is left in the maps */
	bool inherited; /* from an earlier run */
	int old_flows[2], n_old; /* maps whose flows are to be carried over; see "doors" */
	bool back;		 /* into ct_map, from what a change of hands left half done */
	int old_doors; /* door_map of another version, 0: none */
	bool services_late;	 /* those of services get their files with the doors */
} maps = { .again_at = INT64_MAX };

/* A call of bpf(2) of which nothing would be said if it failed: the kernel may have had no memory
 * for a moment. */
#define PATIENT(call)                                                    \
	({                                                               \
		int tries_ = 3, r_;                                      \
		while ((r_ = (call)) && errno == ENOMEM && --tries_)     \
			;                                                \
		r_;                                                      \
	})

static int element_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct element));
}

static bool element_in(const struct element *e, const struct element *at, size_t n)
{
	return n && bsearch(e, at, n, sizeof(*e), element_order);
}

/* Elements as a set: sorted, each once. */
static size_t elements_sort(struct element *at, size_t n)
{
	size_t kept = 0;

	if (n)
		qsort(at, n, sizeof(*at), element_order);
	for (size_t i = 0; i < n; i++)
		if (!i || element_order(&at[i], &at[kept - 1]))
			at[kept++] = at[i];
	return kept;
}

/* One holder more or less; how many there are now. */
static uint64_t shared_count(struct maps *m, const struct element *e, int by)
{
	uint64_t hash = hash64(0, e, sizeof(*e));
	struct shared *s = NULL;

	while ((s = (struct shared *)table_next(&m->shared, (struct link *)s, hash)))
		if (!element_order(&s->element, e))
			break;
	if (!s) {
		s = mem(NULL, sizeof(*s));
		*s = (struct shared){ .element = *e };
		table_add(&m->shared, &s->link, hash);
	}
	if (s->holders += by)
		return s->holders;
	table_remove(&m->shared, &s->link);
	free(s);
	return 0;
}

/* --- writing one service --------------------------------------------------- */
struct writing {
	struct maps *maps;
	const struct programmed *old;
	const struct entry *entry; /* at hand */
	struct buf elements;	   /* to remember */
	bool failed; /* nothing more is written: it could point at what is not there */
};

/* Writes an element, unless it is there already and can only say the same. Before all was
 * written once, what could not be may be there from an earlier run: it shall not be swept. */
static void write_element(struct writing *w, const struct element *e, const void *value,
			  bool constant)
{
	struct maps *m = w->maps;
	bool there = constant && w->old && !w->old->failed && element_in(e, w->old->at, w->old->n);
	struct dying *d = (struct dying *)m->dying.at;

	for (size_t i = 0; e->map == SET_MAP && i < m->dying.len / sizeof(*d); i++)
		if (!memcmp(&d[i].set, &e->set, sizeof(e->set)))
			d[i].set.set = 0;
	if (!there && !w->failed && bpf_map_update_elem(m->fd[e->map], e->bytes, value, BPF_ANY)) {
		w->failed = true;
		if (!w->old || !w->old->failed)
			warn("service %s/%s is not served as it should be: %s did not take it "
			     "(%s); it is tried again from time to time",
			     w->entry->ns, w->entry->name, map_names[e->map],
			     errno == E2BIG || errno == ENOSPC ? "it is full" : strerror(errno));
	}
	if (there || !w->failed || !m->adopted)
		buf_add(&w->elements, e, sizeof(*e));
}

/* A text in pieces; returns its number. A `shared` one is only ever shown. */
static uint64_t write_text(struct writing *w, const char *text, size_t n, bool shared)
{
	struct element e = { .map = TEXT_MAP };

	if (!n)
		return 0;
	e.text.text = shared ? hash64(0, text, n) : number64(text, n);
	for (size_t at = 0; at <= n; at += TL_TEXT) {
		struct tl_text piece = { { 0 } };

		memcpy(piece.at, text + at, n - at < TL_TEXT ? n - at : TL_TEXT);
		e.text.piece = at / TL_TEXT;
		if (!shared)
			write_element(w, &e, &piece, true);
		else if (w->maps->names < MAX_NAMES && shared_count(w->maps, &e, 1) == 1)
			w->maps->names += !bpf_map_update_elem(w->maps->fd[TEXT_MAP], e.bytes, &piece, BPF_ANY);
	}
	return e.text.text;
}

/* Must it see our address, so that its replies come back here? */
static bool backend_snat(const struct backend *b)
{
	return opt.snat == SNAT_ON || (opt.snat == SNAT_AUTO && !b->local);
}

/* A network of backends that want source NAT: pods of another node are reached by one route, so
 * one of them is asked for; each of this node may have a link of its own (Calico). What is
 * here once stays. */
struct place {
	struct link link;
	struct in6_addr net, addr;
};

static void place_note(struct maps *m, const struct in6_addr *addr, bool local)
{
	struct place *p = NULL, new = { .net = *addr, .addr = *addr };
	uint64_t hash;

	addr_mask(&new.net, local ? 128 : addr_is_v4(addr) ? 96 + 24 : 64);
	hash = hash64(0, &new.net, sizeof(new.net));
	while ((p = (struct place *)table_next(&m->places, (struct link *)p, hash)))
		if (!memcmp(&p->net, &new.net, sizeof(new.net)))
			return;
	if (m->places.n == MAX_PLACES)
		return warn("more than %d networks of pods: source NAT may be missing towards some", MAX_PLACES);
	p = mem(NULL, sizeof(*p));
	*p = new;
	table_add(&m->places, &p->link, hash);
	m->places_changed = true;
}

static void put_backend(struct writing *w, struct tl_chunk *chunk, uint32_t at,
			const struct backend *b)
{
	uint64_t seed = hash64(b->port, &b->addr, sizeof(b->addr)); /* every node agrees on it */
	struct tl_backend *to = &chunk->at[at];

	chunk->seed[at] = seed ? seed : 1;
	*to = (struct tl_backend){
		.node = write_text(w, b->node, strlen(b->node), true),
		.port = htons(b->port),
		.flags = (b->local ? TL_BACKEND_LOCAL : 0) | (backend_snat(b) ? TL_BACKEND_SNAT : 0),
	};
	memcpy(&to->addr, &b->addr, sizeof(to->addr));
	if (backend_snat(b))
		place_note(w->maps, &b->addr, b->local);
}

/* Writes the backends of an entry, at most TL_MAX_BACKENDS; the set's number is
 * of the service port and scope as well, so that no other entry has the same. */
static void write_set(struct writing *w, struct tl_svc *svc)
{
	const struct entry *entry = w->entry;
	uint32_t all = entry->n_backends, n = all < TL_MAX_BACKENDS ? all : TL_MAX_BACKENDS;
	struct element e = { .map = SET_MAP };
	struct buf of = { 0 };
	struct tl_chunk chunk;

	if (n != all)
		warn("service %s/%s has %u backends, more than the %u that are looked through: "
		     "the rest gets nothing",
		     entry->ns, entry->name, all, n);
	svc->n_backends = n;
	buf_add(&of, &svc->name, sizeof(svc->name));
	buf_add(&of, &entry->scope, sizeof(entry->scope));
	for (const struct backend *b = entry->backends; b < entry->backends + n; b++) {
		uint16_t more[] = { b->port, b->local, backend_snat(b) };

		buf_add(&of, &b->addr, sizeof(b->addr));
		buf_add(&of, more, sizeof(more));
		buf_add(&of, b->node, strlen(b->node) + 1);
	}
	svc->set = e.set.set = number64(of.at, of.len);
	buf_free(&of);
	for (uint32_t from = 0; from < n; from += TL_CHUNK) {
		for (uint32_t i = 0; i < TL_CHUNK; i++) {
			uint32_t index = from + i < n ? from + i : from; /* see choose() */

			put_backend(w, &chunk, i, &entry->backends[index]);
		}
		e.set.chunk = from / TL_CHUNK;
		write_element(w, &e, &chunk, true);
	}
}

static void write_sources(struct writing *w, uint64_t name)
{
	struct element e = { .map = NET_MAP, .net.scope = { name, name >> 32 } };
	uint32_t one = 1;

	for (int i = 0; i < w->entry->n_sources; i++) {
		const struct cidr *c = &w->entry->sources[i];

		e.net.prefixlen = 64 + c->bits;
		memcpy(&e.net.addr, &c->addr, sizeof(e.net.addr));
		write_element(w, &e, &one, true);
	}
}

/* What a frontend that could not be written has from an earlier run stays in force: its set
 * shall not be swept. */
static void keep_set(struct writing *w, const struct element *frontend)
{
	struct element e = { .map = SET_MAP };
	struct tl_svc was;

	if (PATIENT(bpf_map_lookup_elem(w->maps->fd[SVC_MAP], frontend->bytes, &was)))
		return;
	for (e.set.set = was.set; e.set.chunk * TL_CHUNK < was.n_backends; e.set.chunk++)
		buf_add(&w->elements, &e, sizeof(e));
}

static void write_frontends(struct writing *w, const struct tl_svc *svc)
{
	struct tl_svc none = { 0 };

	for (int i = 0; i < w->entry->n_frontends; i++) {
		const struct frontend *f = &w->entry->frontends[i];
		struct element e = { .map = SVC_MAP };

		memcpy(&e.svc.addr, &f->addr, sizeof(e.svc.addr));
		e.svc.port = htons(f->port);
		e.svc.proto = w->entry->proto;
		write_element(w, &e, svc, false);
		if (w->failed && !w->maps->adopted)
			keep_set(w, &e);
		e.svc.port = e.svc.proto = 0;
		if (w->entry->scope == TL_INTERNAL) /* others may be an address of the node itself */
			write_element(w, &e, &none, true);
	}
}

/* UDP flows may stay if service port, frontend and backend are among these
 * numbers; those of service ports that are not are left alone (rule 17). */
static uint64_t udp_mark(uint64_t name, char what, const struct in6_addr *addr, uint16_t port)
{
	return hash64(name ^ (uint64_t)what << 24 ^ port, addr, sizeof(*addr));
}

static uint64_t entry_udp(struct buf *marks, const struct entry *e, uint64_t name)
{
	uint64_t sum = 0, mark;

	buf_add(marks, &name, sizeof(name));
	for (int i = 0; i < e->n_frontends + e->n_serving; i++) {
		const struct frontend *f = &e->frontends[i];
		const struct backend *b = &e->serving[i - e->n_frontends];

		mark = i < e->n_frontends ? udp_mark(name, 'F', &f->addr, f->port) :
					    udp_mark(name, 'B', &b->addr, b->port);
		buf_add(marks, &mark, sizeof(mark));
		sum += mark;
	}
	return sum;
}

static void write_entry(struct writing *w, const struct entry *entry, struct programmed *new)
{
	struct buf text = { 0 };
	struct tl_svc svc = {
		.affinity = entry->affinity,
		.flags = entry->scope | (entry->drop_if_empty ? TL_SVC_DROP_IF_EMPTY : 0) |
			(entry->n_sources ? TL_SVC_SOURCES : 0),
	};

	w->entry = entry;
	buf_printf(&text, "%s/%s/%s/%s%d", entry->ns, entry->name, entry->port, proto_name(entry->proto),
		   entry->v4 ? 4 : 6);
	svc.name = write_text(w, text.at, text.len, false);
	buf_free(&text);
	write_sources(w, svc.name);
	write_set(w, &svc);
	write_frontends(w, &svc);
	if (entry->proto == IPPROTO_UDP)
		new->udp += entry_udp(&w->maps->udp, entry, svc.name);
}

/* An element that the service no longer has goes: a set soon, a frontend only
 * if it is still this service's, an address with its last holder. */
static void drop_element(struct maps *m, const struct element *e, const struct programmed *old)
{
	struct dying d = { .set = e->set, .at = now_ms() + SET_GRACE };
	struct element name = { .map = TEXT_MAP };
	struct tl_svc svc;

	if (e->map == SET_MAP) {
		buf_add(&m->dying, &d, sizeof(d));
		return;
	}
	if (e->map == SVC_MAP && e->svc.port) {
		if (PATIENT(bpf_map_lookup_elem(m->fd[SVC_MAP], e->bytes, &svc)))
			return;
		name.text.text = svc.name;
		if (!element_in(&name, old->at, old->n))
			return; /* another service has taken it over */
	} else if (e->map == SVC_MAP && shared_count(m, e, -1)) {
		return;
	}
	PATIENT(bpf_map_delete_elem(m->fd[e->map], e->bytes));
}

/* Brings the maps to what `entries` say of a service, and `*memory` (its
 * `programmed`) with it. What could not be written leaves the old in force. */
static void maps_put(struct maps *m, void **memory, const struct entry *entries, int n)
{
	struct programmed *old = *memory, *new, header = { 0 };
	struct writing w = { .maps = m, .old = old };

	buf_add(&w.elements, &header, sizeof(header));
	for (int i = 0; i < n; i++)
		write_entry(&w, &entries[i], &header);
	if (w.failed)
		m->again_at = now_ms() + (m->adopted ? WRITE_AGAIN : WRITE_SOON);
	if (w.failed && old)
		buf_add(&w.elements, old->at, old->n * sizeof(*old->at));
	header.failed = w.failed;
	new = (struct programmed *)w.elements.at;
	header.n = elements_sort(new->at, (w.elements.len - sizeof(header)) / sizeof(*new->at));
	new = mem(new, sizeof(header) + header.n * sizeof(*new->at));
	*new = header;
	for (uint32_t i = 0; i < new->n; i++)
		if (new->at[i].map == SVC_MAP && !new->at[i].svc.port &&
		    !(old && element_in(&new->at[i], old->at, old->n)))
			shared_count(m, &new->at[i], 1);
	for (uint32_t i = old ? old->n : 0; i-- > 0;) /* from the last map: pointers first */
		if (!element_in(&old->at[i], new->at, new->n))
			drop_element(m, &old->at[i], old);
	if (old && old->udp != new->udp) { /* names of service ports that are gone count too */
		m->udp_changed = true;
		for (uint32_t i = 0; i < old->n; i++)
			if (old->at[i].map == TEXT_MAP)
				buf_add(&m->udp, &old->at[i].text.text, sizeof(uint64_t));
	}
	free(old);
	*memory = n ? new : NULL;
	if (!n)
		free(new);
}

/* Brings net_map to these ranges (rule 16), under scope 0. */
static void maps_put_ranges(struct maps *m, const struct cidr *range, size_t n)
{
	struct buf new = { 0 };
	uint32_t one = 1;
	bool failed = false;

	for (; n--; range++) {
		struct element e = { .map = NET_MAP, .net.prefixlen = 64 + range->bits };

		memcpy(&e.net.addr, &range->addr, sizeof(e.net.addr));
		if (bpf_map_update_elem(m->fd[NET_MAP], e.bytes, &one, BPF_ANY)) {
			if (!m->ranges_failed)
				warn("net_map did not take a range of services (%s); it is tried again "
				     "from time to time", strerror(errno));
			failed = true;
		}
		buf_add(&new, &e, sizeof(e));
	}
	m->ranges_failed = failed;
	if (failed)
		m->again_at = now_ms() + (m->adopted ? WRITE_AGAIN : WRITE_SOON);
	n = new.len ? elements_sort((struct element *)new.at, new.len / sizeof(struct element)) : 0;
	new.len = n * sizeof(struct element);
	for (size_t i = 0; i < m->ranges.len; i += sizeof(struct element)) {
		const struct element *old = (struct element *)(m->ranges.at + i);

		if (!element_in(old, (struct element *)new.at, n))
			PATIENT(bpf_map_delete_elem(m->fd[NET_MAP], old->bytes));
	}
	buf_free(&m->ranges);
	m->ranges = new;
}

/* When maps_tick is to be called. */
static int64_t maps_deadline(const struct maps *m)
{
	const struct dying *first = (struct dying *)m->dying.at;

	return m->dying.len && first->at < m->again_at ? first->at : m->again_at;
}

/* Deletes sets nothing has pointed at for a while; then there may be room for what
 * failed: that becomes dirty. */
static void maps_tick(struct maps *m, struct model *model, int64_t now)
{
	const struct dying *d = (struct dying *)m->dying.at;
	size_t n = 0;

	for (; n < m->dying.len / sizeof(*d) && d[n].at <= now; n++)
		bpf_map_delete_elem(m->fd[SET_MAP], &d[n].set);
	m->dying.len -= n * sizeof(*d);
	if (n)
		memmove(m->dying.at, m->dying.at + n * sizeof(*d), m->dying.len);
	if (m->again_at == INT64_MAX || (!n && now < m->again_at))
		return;
	m->again_at = INT64_MAX;
	model->ranges_changed |= m->ranges_failed;
	TABLE_EACH (&model->services, l) {
		struct service *s = (struct service *)l;

		if (s->programmed && ((struct programmed *)s->programmed)->failed)
			model_dirty(model, s);
	}
}

/* --- flows ----------------------------------------------------------------- */
static int number_order(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static bool number_in(const struct buf *numbers, uint64_t number)
{
	size_t n = numbers->len / sizeof(number);

	return n && bsearch(&number, numbers->at, n, sizeof(number), number_order);
}

typedef void walk_fn(void *arg, int fd, const void *key, const void *value);

/* Calls `each` for all of a hash map, many at a time, none twice; false: it could not be read. */
static bool map_walk(int fd, walk_fn *each, void *arg)
{
	enum { AT_ONCE = 1024 };
	struct bpf_map_info info = { 0 };
	uint32_t len = sizeof(info);
	bool good = !bpf_map_get_info_by_fd(fd, &info, &len), more = good;
	char *keys = mem(NULL, (size_t)AT_ONCE * info.key_size);
	char *values = mem(NULL, (size_t)AT_ONCE * info.value_size);
	uint64_t batch, *after = NULL;

	while (more) {
		uint32_t n;

		more = !PATIENT((n = AT_ONCE, bpf_map_lookup_batch(fd, after, &batch, keys, values, &n, NULL)));
		good = more || errno == ENOENT;
		after = &batch;
		for (uint32_t i = 0; i < n && good; i++)
			each(arg, fd, keys + i * info.key_size, values + i * info.value_size);
	}
	free(keys);
	free(values);
	return good;
}

static void flow_flush(void *arg, int fd, const void *key, const void *value)
{
	const struct tl_tuple *t = key;
	const struct tl_flow *f = value;
	struct maps *m = arg;
	bool request = t->dir == TL_REQUEST;
	struct in6_addr front, back;
	uint16_t front_port = ntohs(request ? t->dport : f->to.sport);
	uint16_t back_port = ntohs(request ? f->to.dport : t->sport);

	if (t->proto != IPPROTO_UDP || t->dir > TL_REPLY || (m->adopted && !number_in(&m->udp, f->name)))
		return;
	memcpy(&front, request ? &t->dst : &f->to.src, sizeof(front));
	memcpy(&back, request ? &f->to.dst : &t->src, sizeof(back));
	if (!number_in(&m->udp, udp_mark(f->name, 'F', &front, front_port)) ||
	    !number_in(&m->udp, udp_mark(f->name, 'B', &back, back_port)))
		PATIENT(bpf_map_delete_elem(fd, t));
}

/* After a sync: UDP flows go whose frontend or backend does (rule 17); a client
 * that keeps sending would never notice. */
static void maps_flush_udp(struct maps *m)
{
	if (m->udp_changed || !m->adopted) {
		qsort(m->udp.at, m->udp.len / sizeof(uint64_t), sizeof(uint64_t), number_order);
		for (int i = 0; i < m->n_old; i++)
			map_walk(m->old_flows[i], flow_flush, m);
		if (!map_walk(m->fd[CT_MAP], flow_flush, m))
			warn("ct_map could not be read (%s): UDP flows of lost backends may linger",
			     strerror(errno));
	}
	buf_free(&m->udp);
	m->udp_changed = false;
}

/* Jiffies in a second. */
static uint64_t jiffies_hz(void)
{
	struct timespec tick;

	clock_getres(CLOCK_MONOTONIC_COARSE, &tick); /* one jiffy */
	return (1000000000 + tick.tv_nsec / 2) / tick.tv_nsec;
}

/* bpf_jiffies64(), give or take a second or two: it begins at INITIAL_JIFFIES
 * (linux/jiffies.h), five minutes before it overflows 32 bits, and runs as the clock. */
static uint64_t jiffies_now(uint64_t hz)
{
	return (1ULL << 32) - 300 * hz + now_ms() * hz / 1000;
}

struct sweep {
	uint64_t hz, now;
	int64_t next; /* seconds until one more is over */
	uint64_t flows; /* that are not over */
};

static void flow_expire(void *arg, int fd, const void *key, const void *value)
{
	const struct tl_tuple *t = key;
	const struct tl_flow *f = value;
	struct sweep *s = arg;
	int64_t left = tl_flow_idle(t->proto, f->state) - (int64_t)(s->now - f->seen) / (int64_t)s->hz;

	if (left < -SWEEP_GRACE) {
		bpf_map_delete_elem(fd, t);
		return;
	}
	s->flows += t->dir == TL_REQUEST;
	if (left < s->next)
		s->next = left;
}

static const struct {
	const char *key, *text;
} reasons[TL_N_REASONS] = {
#define ROW(name, key, fate, text) { key, text },
	TL_REASONS(ROW)
#undef ROW
};

static uint64_t counter_read(const struct maps *m, uint32_t reason)
{
	int cpus = libbpf_num_possible_cpus();
	uint64_t *each = mem(NULL, cpus * sizeof(*each)), sum = 0;

	if (!bpf_map_lookup_elem(m->fd[STAT_MAP], &reason, each))
		for (int i = 0; i < cpus; i++)
			sum += each[i];
	free(each);
	return sum;
}

/* Flows that are over make room for others before the table is full, which takes what was
 * not used for longest and asks for no state. Done when we are awake anyway, if there are
 * new flows since the last time or an old one is due: nothing wakes us for it. */
static void flows_sweep(struct maps *m, int64_t now)
{
	struct sweep s = { .hz = jiffies_hz(), .next = INT32_MAX };
	uint64_t begun;

	if (now < m->sweep_at)
		return;
	m->sweep_at = now + SWEEP_LEAST;
	begun = counter_read(m, TL_FLOW_NEW);
	if (begun == m->flows_begun && now < m->sweep_due)
		return;
	s.now = jiffies_now(s.hz);
	map_walk(m->fd[CT_MAP], flow_expire, &s);
	m->flows_begun = begun;
	m->flows = s.flows;
	m->sweep_due = now + (s.next + SWEEP_GRACE) * 1000;
}

/* --- adopting what an earlier run left ------------------------------------- */
/* Deletes from a map what no service has, sets in a while; `known` is sorted. */
static void map_sweep(struct maps *m, enum map map, const struct element *known, size_t n)
{
	struct dying d = { .at = now_ms() + SET_GRACE };
	struct element e, next = { .map = map };
	bool more = !PATIENT(bpf_map_get_next_key(m->fd[map], NULL, next.bytes));

	while (more) {
		e = next;
		more = !PATIENT(bpf_map_get_next_key(m->fd[map], e.bytes, next.bytes));
		d.set = e.set;
		if (element_in(&e, known, n))
			continue;
		if (map == SET_MAP)
			buf_add(&m->dying, &d, sizeof(d));
		else
			PATIENT(bpf_map_delete_elem(m->fd[map], e.bytes));
	}
}

/* Once, after everything was written for the first time. */
static void maps_adopt(struct maps *m, struct table *services)
{
	struct buf known = { 0 };
	struct element *at;
	size_t n;

	TABLE_EACH (services, l) {
		struct programmed *p = ((struct service *)l)->programmed;

		if (p)
			buf_add(&known, p->at, p->n * sizeof(*p->at));
	}
	TABLE_EACH (&m->shared, l)
		buf_add(&known, &((struct shared *)l)->element, sizeof(struct element));
	if (m->ranges.len)
		buf_add(&known, m->ranges.at, m->ranges.len);
	at = (struct element *)known.at;
	n = elements_sort(at, known.len / sizeof(*at));
	for (enum map map = TEXT_MAP; map <= SVC_MAP; map++)
		map_sweep(m, map, at, n);
	buf_free(&known);
}

/* The one function that changes what the datapath knows of services: everything
 * that is dirty, however many events made it so. True: something was written. */
static bool maps_sync(struct maps *m, struct model *model)
{
	static struct resolved r;
	struct service *s;
	bool changed = false;

	model_settle(model);
	while ((s = model_next_dirty(model))) {
		resolve_service(model, s, &r);
		maps_put(m, &s->programmed, r.entries, r.n);
		changed = true;
		if (s->gone)
			model_forget(model, s);
	}
	if (model->ranges_changed) {
		struct buf ranges = model_ranges(model);

		maps_put_ranges(m, (struct cidr *)ranges.at, ranges.len / sizeof(struct cidr));
		buf_free(&ranges);
		changed = true;
	}
	if (changed || !m->adopted)
		maps_flush_udp(m);
	if (!m->adopted && m->inherited)
		maps_adopt(m, &model->services);
	m->adopted = true;
	return changed;
}
#pragma GCC pop_options
/* === interfaces (rtnetlink) ===============================================
 * That one came or went is told by group RTNLGRP_LINK; which there are, is looked up. */

/* Asks what there is of an interface. One socket for life: a failure to get another would look
 * as if no interface were there. -1 with errno, ENODEV: there is none. */
static int link_ask(unsigned long request, struct ifreq *dev)
{
	static int fd = -1;

	if (fd < 0)
		fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return ioctl(fd, request, dev);
}

static bool link_is_there(int ifindex)
{
	struct ifreq dev = { .ifr_ifindex = ifindex };

	return !link_ask(SIOCGIFNAME, &dev) || errno != ENODEV;
}

/* A socket that hears of links, if `groups` says so; -1 with why. */
static int netlink_open(unsigned groups)
{
	struct sockaddr_nl me = { .nl_family = AF_NETLINK, .nl_groups = groups };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE);

	if (fd >= 0 && !bind(fd, (struct sockaddr *)&me, sizeof(me)))
		return fd;
	fail("cannot ask the kernel for interfaces: netlink: %s", strerror(errno));
	close(fd);
	return -1;
}

/* Asks for all qdiscs or all filters of an interface. */
static void netlink_ask(int fd, int type, int ifindex, uint32_t parent)
{
	struct {
		struct nlmsghdr h;
		struct tcmsg t;
	} ask = { .h = { .nlmsg_len = sizeof(ask),
			 .nlmsg_type = type,
			 .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP },
		  .t = { .tcm_ifindex = ifindex, .tcm_parent = parent } };

	if (send(fd, &ask, sizeof(ask), 0) < 0)
		warn("netlink: %s", strerror(errno));
}

/* Reads what is there and calls `on` for each message; true: the end of a dump
 * was among it. */
static bool netlink_read(int fd, void (*on)(void *arg, const struct nlmsghdr *), void *arg)
{
	_Alignas(struct nlmsghdr) char room[16384];
	bool done = false;
	ssize_t n;

	while ((n = recv(fd, room, sizeof(room), 0)) > 0 || (n < 0 && errno == ENOBUFS))
		for (struct nlmsghdr *h = (struct nlmsghdr *)room; n > 0 && NLMSG_OK(h, n);
		     h = NLMSG_NEXT(h, n)) {
			done |= h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR;
			on(arg, h);
		}
	return done;
}

/* The same until the end of a dump; false: it did not come. */
static bool netlink_wait(int fd, void (*on)(void *arg, const struct nlmsghdr *), void *arg)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	while (poll(&p, 1, 5000) > 0)
		if (netlink_read(fd, on, arg))
			return true;
	return false;
}

/* How the kernel would send to an address: by which interface, from which address. */
struct route {
	int ifindex; /* 0: not at all, or it is an address of ours */
	bool unknown; /* the kernel had no memory to tell */
	struct in6_addr src;
};

static void on_route(void *arg, const struct nlmsghdr *h)
{
	const struct rtmsg *m = NLMSG_DATA(h);
	struct route *r = arg;
	int left = RTM_PAYLOAD(h), error;

	if (h->nlmsg_type == NLMSG_ERROR) {
		error = ((struct nlmsgerr *)NLMSG_DATA(h))->error;
		r->unknown = error == -ENOMEM || error == -ENOBUFS;
	}
	if (h->nlmsg_type != RTM_NEWROUTE || m->rtm_type != RTN_UNICAST)
		return;
	for (const struct rtattr *a = RTM_RTA(m); RTA_OK(a, left); a = RTA_NEXT(a, left))
		if (a->rta_type == RTA_OIF)
			memcpy(&r->ifindex, RTA_DATA(a), sizeof(r->ifindex));
		else if (a->rta_type == RTA_PREFSRC)
			addr_take(&r->src, m->rtm_family, RTA_DATA(a));
}

/* Asks for it. */
static void route_find(int fd, const struct in6_addr *to, struct route *r)
{
	bool v4 = addr_is_v4(to);
	struct {
		struct nlmsghdr h;
		struct rtmsg m;
		struct rtattr a;
		struct in6_addr dst;
	} ask = { .h = { .nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK },
		  .m = { .rtm_family = v4 ? AF_INET : AF_INET6, .rtm_dst_len = v4 ? 32 : 128 },
		  .a = { .rta_type = RTA_DST, .rta_len = RTA_LENGTH(v4 ? 4 : 16) } };

	memcpy(&ask.dst, v4 ? to->s6_addr + 12 : to->s6_addr, v4 ? 4 : 16);
	ask.h.nlmsg_len = offsetof(typeof(ask), a) + ask.a.rta_len;
	*r = (struct route){ 0 };
	if (send(fd, &ask, ask.h.nlmsg_len, 0) < 0 || !netlink_wait(fd, on_route, r))
		r->unknown = true;
}

/* === doors (programs on interfaces) =======================================
 * Everything we leave in the kernel hangs on files in the pin directory:
 *   svc_map, ct_map, ...      the maps
 *   to_IFINDEX, from_IFINDEX  the doors of an interface: a tcx link each, or where there is
 *                             no tcx the program, attached by cls_bpf
 *   clsact_IFINDEX            we made this interface's clsact qdisc (any map, for
 *                             a file to exist)
 *   route_RANGE, routes_null  see "tailscaled"; any map too
 * so whoever comes after us, also after kill -9, knows what is ours.
 *
 * At a restart each door gets the new program in one step, with the same maps. Where ct_map
 * must be another one, because --flows is or a flow has more members, flows change hands, and
 * until all are carried over replies meet both programs: what one does not know it passes on.
 *
 *                      before   1     2     3     4     5
 *     also_to_IFINDEX           old   old   old
 *     to_IFINDEX       old            new   new   new   new   (towards pods from_IFINDEX likewise)
 *     new_ct_map                      new   new   new
 *     ct_map           old      old   old   old   old   new
 *     from_IFINDEX     old      old   old   new   new   new   (of the VPN: here flows begin)
 *
 * They are carried over after 2, and after 3 those begun meanwhile. Whoever finds this half done
 * carries over at once what each of the maps has. If new_ct_map is the one it wants it goes on.
 * If ct_map is, it goes back: from_IFINDEX first, while also_to_IFINDEX still knows ct_map and
 * to_IFINDEX the other, then to_IFINDEX. (One that wants neither leaves for moments nobody who
 * knows flows that just began.) Of two flows in one place that counts which was used last. So
 * members of struct tl_flow are only ever added, at its end, and its key stays as it is. */
#define BPFFS	    "/sys/fs/bpf"
#define MOUNT_NAME  "tail_lifter" /* the source of a bpffs that we mounted */
#define TC_PRIORITY 43171	  /* for cls_bpf: our own */
#ifndef ARPHRD_RAWIP
#define ARPHRD_RAWIP 519 /* linux/if_arp.h, which does not go together with net/if.h */
#define ARPHRD_NONE  0xfffe
#endif

static const char *pin_path(const char *word, int ifindex)
{
	static char path[PATH_MAX];

	snprintf(path, sizeof(path), ifindex ? "%s/%s_%d" : "%s/%s", opt.pin_dir, word, ifindex);
	return path;
}

static bool is_bpffs(const char *path)
{
	struct statfs fs;

	return !statfs(path, &fs) && (unsigned long)fs.f_type == BPF_FS_MAGIC;
}

static int pin_dir_fd(void)
{
	return open(opt.pin_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* What the pin directory is in. */
static void pin_dir_parent(char parent[PATH_MAX])
{
	char *slash;

	snprintf(parent, PATH_MAX, "%s", opt.pin_dir);
	slash = strrchr(parent, '/');
	if (slash && slash != parent)
		*slash = 0;
}

/* The pin directory, made if it is not there; a descriptor or -1 with why. */
static int pin_dir_open(void)
{
	char parent[PATH_MAX];
	struct statfs fs;
	int fd;

	pin_dir_parent(parent);
	if (statfs(parent, &fs) && errno == ENOMEM) /* else another would be mounted over it */
		return fail("cannot look at %s: %s", parent, strerror(errno));
	if (!is_bpffs(parent) && !strcmp(parent, BPFFS) && mount(MOUNT_NAME, BPFFS, "bpf", 0, NULL))
		return fail("no bpffs at %s and it cannot be mounted: %s; mount -t bpf bpf %s, or "
			    "name another by --pin-dir",
			    BPFFS, strerror(errno), BPFFS);
	if (!is_bpffs(parent))
		return fail("%s is not in a bpffs: --pin-dir must name a directory below one, such "
			    "as %s/tail_lifter",
			    opt.pin_dir, BPFFS);
	if (mkdir(opt.pin_dir, 0700) && errno != EEXIST)
		return fail("cannot make %s: %s; run as root", opt.pin_dir, strerror(errno));
	fd = pin_dir_fd();
	return fd >= 0 ? fd : fail("cannot open %s: %s", opt.pin_dir, strerror(errno));
}

/* One agent a pin directory: the lock goes with the process, however it ends. */
static bool pin_dir_locked(int fd)
{
	return flock(fd, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK;
}

/* Takes it. Whoever only looks (above) holds it for a moment, so more than once. */
static bool pin_dir_lock(int fd)
{
	for (int tries = 0; tries < 20; tries++, usleep(10000))
		if (!flock(fd, LOCK_EX | LOCK_NB))
			return true;
	return false;
}

/* Whose lock it is: a pid as we see it, from the kernel, for what an agent says of
 * itself means nothing outside its container; 0: none that we can see. */
static int pin_dir_holder(int fd)
{
	FILE *f = fopen("/proc/locks", "re");
	char line[256];
	unsigned major_of, minor_of;
	unsigned long inode;
	struct stat s;
	int pid, holder = 0;

	while (f && !holder && !fstat(fd, &s) && fgets(line, sizeof(line), f))
		if (sscanf(line, "%*s FLOCK %*s WRITE %d %x:%x:%lu", &pid, &major_of, &minor_of,
			   &inode) == 4 &&
		    makedev(major_of, minor_of) == s.st_dev && inode == s.st_ino)
			holder = pid;
	if (f)
		fclose(f);
	return holder;
}

static const char *agent_where(int pid)
{
	static char text[32];

	snprintf(text, sizeof(text), "pid %d", pid);
	return pid ? text : "in another container or pid namespace";
}

static int pinned(const char *word, int ifindex)
{
	return bpf_obj_get(pin_path(word, ifindex));
}

static void unpin(const char *word, int ifindex)
{
	unlink(pin_path(word, ifindex));
}

/* In place of what had the name, in one step. */
static int pin(int fd, const char *word, int ifindex)
{
	char new[PATH_MAX];

	snprintf(new, sizeof(new), "%s", pin_path("new", 0));
	unlink(new);
	if (!bpf_obj_pin(fd, new) && !rename(new, pin_path(word, ifindex)))
		return 0;
	return fail("cannot pin %s: %s", pin_path(word, ifindex), strerror(errno));
}

/* A pinned door is a link (tcx) or a program (cls_bpf), whose info begins with
 * BPF_PROG_TYPE_SCHED_CLS there; 0: it cannot be looked at. */
static bool is_tcx_link(int fd, struct bpf_link_info *info)
{
	uint32_t len = sizeof(*info);

	memset(info, 0, sizeof(*info));
	return !bpf_obj_get_info_by_fd(fd, info, &len) && info->type == BPF_LINK_TYPE_TCX;
}

static struct bpf_tc_hook tc_hook(int ifindex, enum bpf_tc_attach_point point)
{
	return (struct bpf_tc_hook){ .sz = sizeof(struct bpf_tc_hook),
				     .ifindex = ifindex,
				     .attach_point = point };
}

/* The handle of our filters, one for each pin directory, and of those that stay beside them. */
static uint32_t tc_handle(bool also)
{
	return (hash64(0, opt.pin_dir, strlen(opt.pin_dir)) & 0x3fffffff) * 2 + 2 + also;
}

/* What hangs on an interface's clsact qdisc. */
struct clsact {
	int ifindex;
	bool there; /* all true also if that is not known */
	bool ours, others;
	bool known;
};

static void on_qdisc(void *arg, const struct nlmsghdr *h)
{
	const struct tcmsg *t = NLMSG_DATA(h);
	struct clsact *c = arg;

	c->there |= h->nlmsg_type == RTM_NEWQDISC && t->tcm_ifindex == c->ifindex &&
		t->tcm_parent == TC_H_CLSACT;
}

/* A filter, or with handle 0 a priority that has some. */
static void on_filter(void *arg, const struct nlmsghdr *h)
{
	const struct tcmsg *t = NLMSG_DATA(h);
	bool prio = h->nlmsg_type == RTM_NEWTFILTER && t->tcm_info >> 16 == TC_PRIORITY;
	bool ours = prio && t->tcm_handle / 2 == tc_handle(false) / 2;
	struct clsact *c = arg;

	c->ours |= ours;
	c->others |= (h->nlmsg_type == RTM_NEWTFILTER && !ours && !(prio && !t->tcm_handle)) ||
		h->nlmsg_type == NLMSG_ERROR;
}

static struct clsact clsact_look(int ifindex)
{
	static const uint32_t sides[] = { TC_H_MIN_INGRESS, TC_H_MIN_EGRESS };
	struct clsact c = { .ifindex = ifindex };
	int fd = netlink_open(0);

	netlink_ask(fd, RTM_GETQDISC, ifindex, 0);
	c.known = netlink_wait(fd, on_qdisc, &c);
	for (int i = 0; i < 2 && c.known && c.there; i++) {
		netlink_ask(fd, RTM_GETTFILTER, ifindex, TC_H_MAKE(TC_H_CLSACT, sides[i]));
		c.known = netlink_wait(fd, on_filter, &c);
	}
	c.there |= !c.known;
	c.others |= !c.known;
	close(fd);
	return c;
}

/* All names of doors. */
static const char *const door_words[] = { "to", "from", "also_to", "also_from" };

/* There is such a file, or it cannot be told. */
static bool has_file(const char *word, int ifindex)
{
	return !access(pin_path(word, ifindex), F_OK) || errno != ENOENT;
}

static bool has_files(int ifindex)
{
	for (size_t i = 0; i < ARRAY_SIZE(door_words); i++)
		if (has_file(door_words[i], ifindex))
			return true;
	return false;
}

/* By cls_bpf, where there is no tcx. Replaces a filter of ours in one step. Files come
 * first, so that no crash leaves a filter or a qdisc without one. A qdisc with filters of
 * ours alone, of which no file tells (the bpffs was lost), we have made as well. */
static int door_attach_tc(int prog, const char *word, int ifindex, bool in)
{
	struct bpf_tc_hook hook = tc_hook(ifindex, in ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	DECLARE_LIBBPF_OPTS(bpf_tc_opts, o, .prog_fd = prog, .flags = BPF_TC_F_REPLACE,
			    .handle = tc_handle(*word == 'a'), .priority = TC_PRIORITY);
	struct clsact c = clsact_look(ifindex);
	bool made = !c.there || (c.ours && !c.others && !has_files(ifindex));
	int r;

	if (!c.known) /* whose the qdisc is */
		return fail("cannot look for a clsact qdisc");
	if (pin(prog, word, ifindex) || (made && pin(maps.fd[STAT_MAP], "clsact", ifindex)))
		return -1;
	r = bpf_tc_hook_create(&hook);
	if (r && r != -EEXIST)
		return fail("cannot make a clsact qdisc: %s; the kernel needs sch_ingress",
			    strerror(-r));
	r = bpf_tc_attach(&hook, &o);
	return r ? fail("cannot attach by cls_bpf: %s; the kernel needs cls_bpf", strerror(-r)) : 0;
}

/* Puts `prog` behind a door; one of an earlier run is taken over in one step, so no packet
 * goes by unseen, or ends now: without a name it would, but later. One that stays beside it
 * comes after it. 0, or -1 with why. */
static int door_attach(int prog, const char *word, int ifindex, bool in)
{
	int old = pinned(word, ifindex), also = pinned(in ? "also_from" : "also_to", ifindex);
	struct bpf_link_info info;
	int link, r = -1;

	if (old >= 0 && is_tcx_link(old, &info) && info.tcx.ifindex == (uint32_t)ifindex)
		r = bpf_link_update(old, prog, NULL);
	if (r) {
		DECLARE_LIBBPF_OPTS(bpf_link_create_opts, beside, .flags = BPF_F_BEFORE | BPF_F_LINK,
				    .tcx.relative_fd = also);
		bool is_beside = also >= 0 && is_tcx_link(also, &info);

		link = bpf_link_create(prog, ifindex, in ? BPF_TCX_INGRESS : BPF_TCX_EGRESS,
				       is_beside ? &beside : NULL);
		if (link < 0)
			r = errno == EINVAL ? door_attach_tc(prog, word, ifindex, in) :
					      fail("cannot attach by tcx: %s", strerror(errno));
		else if (!(r = pin(link, word, ifindex)))
			bpf_link_detach(old);
		close(link);
	}
	close(also);
	close(old);
	return r;
}

/* What is behind a door stays there under its other name, beside what comes. */
static int door_keep(const char *word, int ifindex, bool in)
{
	const char *also = in ? "also_from" : "also_to";
	int old = pinned(also, ifindex), r = 0;
	bool kept = old >= 0 || errno != ENOENT; /* by one who did not come to the end */
	struct bpf_link_info info;
	char path[PATH_MAX];

	if (!kept)
		old = pinned(word, ifindex);
	snprintf(path, sizeof(path), "%s", pin_path(word, ifindex));
	if (old < 0)
		return errno == ENOENT ? 0 : fail("cannot pin %s: %s", path, strerror(errno));
	if (!is_tcx_link(old, &info))
		r = info.type ? door_attach_tc(old, also, ifindex, in) :
				fail("cannot look at %s: %s", path, strerror(errno));
	else if (!kept && rename(path, pin_path(also, ifindex)))
		r = fail("cannot pin %s: %s", path, strerror(errno));
	close(old);
	return r;
}

/* Takes our filters away, or only those `also`. */
static void doors_detach_tc(int ifindex, bool also)
{
	for (int i = also ? 2 : 0; i < 4; i++) {
		struct bpf_tc_hook side = tc_hook(ifindex, i & 1 ? BPF_TC_EGRESS : BPF_TC_INGRESS);
		DECLARE_LIBBPF_OPTS(bpf_tc_opts, o, .handle = tc_handle(i > 1),
				    .priority = TC_PRIORITY);

		bpf_tc_detach(&side, &o);
	}
}

/* The qdisc too, if nobody uses it now. */
static void clsact_detach(int ifindex)
{
	struct bpf_tc_hook hook = tc_hook(ifindex, BPF_TC_INGRESS | BPF_TC_EGRESS);

	if (!clsact_look(ifindex).others)
		bpf_tc_hook_destroy(&hook);
}

/* The doors of an interface that have files with these words, until the last. */
static void doors_unpin(int ifindex, size_t from)
{
	struct bpf_link_info info;
	bool tc = false;

	for (size_t i = from; i < ARRAY_SIZE(door_words); i++) {
		int fd = pinned(door_words[i], ifindex);

		tc |= (fd >= 0 || errno != ENOENT) && !is_tcx_link(fd, &info);
		close(fd);
	}
	if (tc && link_is_there(ifindex))
		doors_detach_tc(ifindex, from);
	if (tc && !from && !access(pin_path("clsact", ifindex), F_OK))
		clsact_detach(ifindex);
	if (!from)
		unpin("clsact", ifindex);
	for (size_t i = ARRAY_SIZE(door_words); i-- > from;) /* a link goes with its last holder */
		unpin(door_words[i], ifindex);
}

/* Leaves an interface as it was before us; also one that is no longer there. */
static void doors_detach(int ifindex)
{
	doors_unpin(ifindex, 0);
	bpf_map_delete_elem(maps.fd[DOOR_MAP], &ifindex);
}

/* The name of the next file in a directory of a bpffs, but for those with a dot, which only
 * the kernel can make there; NULL: that was all, and it is closed. */
static const char *dir_next(DIR *dir)
{
	struct dirent *d;

	while (dir && (d = readdir(dir)))
		if (!strchr(d->d_name, '.'))
			return d->d_name;
	if (dir)
		closedir(dir);
	return NULL;
}

/* The interfaces whose doors are pinned, in order, each once; to be freed. */
static uint64_t *doors_list(size_t *n)
{
	DIR *dir = opendir(opt.pin_dir);
	struct buf list = { 0 };
	const char *name;
	uint64_t ifindex, *at;
	size_t all;

	while ((name = dir_next(dir)))
		if (sscanf(name, "to_%" SCNu64, &ifindex) == 1 ||
		    sscanf(name, "from_%" SCNu64, &ifindex) == 1 ||
		    sscanf(name, "also_%*[a-z]_%" SCNu64, &ifindex) == 1)
			buf_add(&list, &ifindex, sizeof(ifindex));
	at = (uint64_t *)list.at;
	all = list.len / sizeof(ifindex);
	if (all)
		qsort(at, all, sizeof(*at), number_order);
	*n = 0;
	for (size_t i = 0; i < all; i++)
		if (!i || at[i] != at[i - 1])
			at[(*n)++] = at[i];
	return at;
}

/* --- the object: programs and maps ------------------------------------------ */
static struct tail_lifter *bpf; /* while loading: it takes 140 kB */
static struct buf bpf_log;	/* what libbpf and the verifier said meanwhile */

/* Programs: towards the VPN, towards pods; on links of bare IP, of Ethernet; out, in. */
static const char *const door_names[2][2][2] = {
	{ { "to_tailnet", "from_tailnet" }, { "to_tailnet_l2", "from_tailnet_l2" } },
	{ { "to_pods", "from_pods" }, { "to_pods_l2", "from_pods_l2" } },
};
static int door_fd[2][2][2];

static int on_libbpf(enum libbpf_print_level level, const char *fmt, va_list ap)
{
	va_list again;
	int n;

	if (level == LIBBPF_DEBUG)
		return 0;
	va_copy(again, ap);
	n = vsnprintf(NULL, 0, fmt, again); /* a verifier's log is long */
	va_end(again);
	buf_room(&bpf_log, n);
	bpf_log.len += vsnprintf(bpf_log.at + bpf_log.len, n + 1, fmt, ap);
	return 0;
}

/* Is the pinned map what this program was built for? */
static bool map_fits(const struct bpf_map_info *i, const struct bpf_map *map)
{
	return i->type == bpf_map__type(map) && i->key_size == bpf_map__key_size(map) &&
		i->value_size == bpf_map__value_size(map) &&
		i->map_flags == bpf_map__map_flags(map) &&
		i->max_entries == bpf_map__max_entries(map);
}

static bool map_is_pinned(const struct bpf_map *map)
{
	return !bpf_map__is_internal(map) && strcmp(bpf_map__name(map), "packet_map");
}

/* A map of an earlier run: a descriptor, -ENOENT if there is none, or -1 with why. */
static int map_find(const char *word, struct bpf_map_info *info)
{
	uint32_t len = sizeof(*info);
	int fd = pinned(word, 0);

	*info = (struct bpf_map_info){ 0 };
	if (fd < 0 && errno == ENOENT)
		return -ENOENT;
	if (fd >= 0 && !bpf_map_get_info_by_fd(fd, info, &len))
		return fd;
	fail("cannot look at %s: %s%s", word, strerror(errno),
	     errno == EPERM ? ": run as root, or with CAP_BPF and CAP_NET_ADMIN" : "");
	close(fd);
	return -1;
}

/* Do the maps of an earlier run that say what is served fit, or are there none? They belong
 * together: services whose backends were left behind in another map would drop all. */
static bool services_fit(void)
{
	bool fit = true;

	for (int i = 0; i < CT_MAP; i++) {
		struct bpf_map_info info;
		int fd = map_find(map_names[i], &info);

		fit &= fd == -ENOENT ||
			(fd >= 0 && map_fits(&info, bpf_object__find_map_by_name(bpf->obj, map_names[i])));
		close(fd);
	}
	return fit;
}

static bool is_of_services(const struct bpf_map *map)
{
	for (int i = 0; i < CT_MAP; i++)
		if (!strcmp(bpf_map__name(map), map_names[i]))
			return true;
	return false;
}

/* Puts the maps of an earlier run into the object, where they still fit. One that does not
 * is replaced: what the agent writes it writes again, and flows are carried over. Until that
 * is done the old programs go on, with the old maps. */
static int maps_reuse(struct maps *m)
{
	struct bpf_map *map;

	m->services_late = !services_fit();
	bpf_object__for_each_map (map, bpf->obj) {
		bool flows = map == bpf->maps.ct_map, reused = false;
		bool late = m->services_late && is_of_services(map);

		for (int new = !map_is_pinned(map); new <= flows; new++) { /* and what a change of hands left */
			struct bpf_map_info info;
			int fd = map_find(new ? "new_ct_map" : bpf_map__name(map), &info);

			if (fd == -ENOENT)
				continue;
			if (fd < 0)
				return -1;
			if (!reused && !late && map_fits(&info, map)) {
				if (bpf_map__reuse_fd(map, fd))
					return fail("cannot adopt %s: %s", bpf_map__name(map),
						    strerror(errno));
				reused = m->inherited = true;
			} else if (flows && info.key_size == sizeof(struct tl_tuple)) {
				m->old_flows[m->n_old++] = fd;
				m->back = reused;
				continue;
			} else if (map == bpf->maps.door_map) {
				m->old_doors = fd;
				continue;
			}
			close(fd);
		}
	}
	return 0;
}

/* Files of the maps, but for those that the old programs go on with. libbpf gives them no
 * names if it finds too little memory to see whether the kernel has names; the next would. */
static int maps_pin(const struct maps *m)
{
	struct bpf_map *map;

	bpf_object__for_each_map (map, bpf->obj) {
		struct bpf_map_info info = { 0 };
		uint32_t len = sizeof(info);

		if (bpf_map_get_info_by_fd(bpf_map__fd(map), &info, &len) || !*info.name)
			return fail("cannot make maps: %s", strerror(ENOMEM));
		if (map_is_pinned(map) && !(m->services_late && is_of_services(map)) &&
		    !(m->n_old && map == bpf->maps.ct_map) &&
		    pin(bpf_map__fd(map), bpf_map__name(map), 0))
			return -1;
	}
	return 0;
}

/* The i-th of door_names. */
static struct bpf_program *door_program(int i)
{
	return bpf_object__find_program_by_name(bpf->obj, door_names[i / 4][i / 2 % 2][i % 2]);
}

/* The object as it comes out of this file. 0, or -1 with why. */
static int datapath_open(void)
{
	bpf = tail_lifter__open();
	if (!bpf)
		return fail("cannot open the BPF object: %s", strerror(errno));
	bpf->rodata->tl_hz = jiffies_hz();
	bpf_map__set_max_entries(bpf->maps.ct_map, opt.flows);
	for (int i = 0; i < 8; i++)
		bpf_program__set_autoload(door_program(i), i < 4 || opt.snat);
	return 0;
}

/* Into the kernel with it. 0, or -1 with why. */
static int datapath_verify(void)
{
	int r = tail_lifter__load(bpf);

	if (r && loud > 1)
		fwrite(bpf_log.at, 1, bpf_log.len, stderr);
	buf_free(&bpf_log);
	if (r == -EPERM)
		return fail(
			"the kernel does not let us load BPF programs (%s): run as root, or with "
			"CAP_BPF and CAP_NET_ADMIN; -v prints what it says",
			strerror(-r));
	if (r)
		return fail(
			"this kernel does not take our BPF programs: %s; it must be 5.10 or newer "
			"with CONFIG_BPF_SYSCALL, and no security module forbid them; -v prints its reasons",
			strerror(-r));
	return 0;
}

/* From a map of another layout into ours. */
struct carry {
	uint32_t size; /* of a value there */
	bool near;     /* flows: only what the VPN's doors look for; else only what those towards pods do */
	int error;     /* of the first that was not taken */
};

/* All of such a map. 0, or -1 with errno. */
static int map_carry(int from, walk_fn *each, struct carry *c)
{
	struct bpf_map_info info = { 0 };
	uint32_t len = sizeof(info);

	if (bpf_map_get_info_by_fd(from, &info, &len))
		return -1;
	c->size = info.value_size;
	if (!map_walk(from, each, c))
		return -1;
	errno = c->error;
	return errno ? -1 : 0;
}

static void door_carry(void *arg, int fd, const void *key, const void *value)
{
	struct tl_door door = { 0 };
	struct carry *c = arg;

	(void)fd;
	memcpy(&door, value, c->size < sizeof(door) ? c->size : sizeof(door));
	if (!c->error && bpf_map_update_elem(maps.fd[DOOR_MAP], key, &door, BPF_ANY))
		c->error = errno;
}

/* Before our door_map takes the other's place: doors towards pods that nobody knew to be such
 * would be taken away until their routes are looked at. 0, or -1 with why. */
static int doors_carry(struct maps *m)
{
	struct carry c = { 0 };
	int r = 0;

	if (m->old_doors && map_carry(m->old_doors, door_carry, &c))
		r = fail("doors cannot be carried over: %s", strerror(errno));
	if (m->old_doors)
		close(m->old_doors);
	m->old_doors = 0;
	return r;
}

/* A descriptor that outlives libbpf's. */
static int keep(int fd)
{
	return fcntl(fd, F_DUPFD_CLOEXEC, 0);
}

/* Loads the programs, with the maps of an earlier run where there are any.
 * 0, or -1 with why. */
static int datapath_load(struct maps *m)
{
	int r;

	if (datapath_open() || maps_reuse(m) || datapath_verify())
		return -1;
	for (int i = 0; i < N_MAPS; i++)
		m->fd[i] = keep(bpf_object__find_map_fd_by_name(bpf->obj, map_names[i]));
	for (int i = 0; i < 8; i++)
		door_fd[i / 4][i / 2 % 2][i % 2] = keep(bpf_program__fd(door_program(i)));
	r = doors_carry(m) || maps_pin(m) ? -1 : 0;
	tail_lifter__destroy(bpf);
	bpf = NULL;
	return door_fd[0][1][1] < 0 ? fail("too many open files: raise ulimit -n") : r;
}

/* --- attaching --------------------------------------------------------------- */
/* An interface with doors, or that is to have some. */
struct doorway {
	char name[IF_NAMESIZE];
	int ifindex; /* 0: there is none */
	unsigned short type; /* ARPHRD_* */
	uint32_t mtu;
	bool pods;		 /* towards them, for source NAT, */
	struct in6_addr snat[2]; /* with our addresses there, IPv4 and IPv6 */
	bool attached, halfway; /* halfway: but for the door where flows begin */
	uint64_t said; /* a hash of the last failure to attach, 0: it did not fail */
};

/* By name, or by index if that is empty: what there is. False: nothing. */
static bool link_look(struct doorway *d)
{
	struct ifreq dev = { .ifr_ifindex = d->ifindex };
	bool there;

	if (*d->name) {
		memcpy(dev.ifr_name, d->name, sizeof(dev.ifr_name));
		there = !link_ask(SIOCGIFINDEX, &dev);
		d->ifindex = there ? dev.ifr_ifindex : 0;
	} else {
		there = !link_ask(SIOCGIFNAME, &dev);
		memcpy(d->name, dev.ifr_name, sizeof(d->name));
	}
	if (there && !link_ask(SIOCGIFHWADDR, &dev))
		d->type = dev.ifr_hwaddr.sa_family;
	if (there && !link_ask(SIOCGIFMTU, &dev))
		d->mtu = dev.ifr_mtu;
	return there;
}

/* By its ARPHRD_ type. */
static bool is_ethernet(unsigned short type)
{
	return type == ARPHRD_ETHER || type == ARPHRD_LOOPBACK;
}

/* A kind of link that our programs can read. 0, or -1 with why. */
static int link_check(const struct doorway *d)
{
	static const unsigned short bare[] = { ARPHRD_NONE,   ARPHRD_RAWIP,   ARPHRD_PPP,
					       ARPHRD_TUNNEL, ARPHRD_TUNNEL6, ARPHRD_IPGRE };

	for (size_t i = 0; i < ARRAY_SIZE(bare); i++)
		if (d->type == bare[i] || is_ethernet(d->type))
			return 0;
	return fail("it is of a kind we cannot read (ARPHRD type %d): not Ethernet, not "
		    "bare IP",
		    d->type);
}

/* Was it told of an interface towards pods? */
static bool is_far(const struct tl_door *d)
{
	return d->snat[0].w[3] || d->snat[1].w[0];
}

/* Tells the datapath of it. */
static int door_note(const struct doorway *d)
{
	struct tl_door door = { .mtu = d->pods ? 0 : d->mtu };

	memcpy(door.snat, d->snat, sizeof(door.snat));
	return bpf_map_update_elem(maps.fd[DOOR_MAP], &d->ifindex, &door, BPF_ANY) ?
		       fail("door_map: %s", strerror(errno)) :
		       0;
}

/* The door out or in; beside what is behind it. On the way back both programs that are needed
 * may be there already (a filter whose file is there may be gone: it is put back). */
static int door_put(const struct doorway *d, bool in, bool beside)
{
	const char *word = in ? "from" : "to", *also = in ? "also_from" : "also_to";
	bool both = beside && maps.back && !access(pin_path(also, d->ifindex), F_OK) &&
		!access(pin_path(word, d->ifindex), F_OK);

	if (beside && door_keep(word, d->ifindex, in))
		return -1;
	return both ? 0 :
		      door_attach(door_fd[d->pods][is_ethernet(d->type)][in], word, d->ifindex, in);
}

/* `why`, once. What was there before us stays as it is. */
static void door_failed(struct doorway *d)
{
	uint64_t h = hash64(0, why, strlen(why));

	if (h != d->said)
		warn("interface %s: %s", d->name, why);
	d->said = h;
	if (!has_file(d->pods ? "to" : "from", d->ifindex) && !has_file("also_to", d->ifindex))
		doors_detach(d->ifindex);
}

static void flow_carry(void *arg, int fd, const void *key, const void *value)
{
	struct tl_flow flow = { 0 }, there = { 0 };
	struct carry *c = arg;

	(void)fd;
	if (c->error || (((const struct tl_tuple *)key)->dir < TL_OUT) != c->near)
		return;
	memcpy(&flow, value, c->size < sizeof(flow) ? c->size : sizeof(flow));
	if ((bpf_map_lookup_elem(maps.fd[CT_MAP], key, &there) && errno != ENOENT) ||
	    (there.seen < flow.seen && bpf_map_update_elem(maps.fd[CT_MAP], key, &flow, BPF_ANY)))
		c->error = errno;
}

/* Those towards pods first: once it knows a reply, to_pods would give the request a source port
 * of its own. 0, or -1 with why. */
static int flows_carry(const struct maps *m)
{
	for (int i = 0; i < 2 * m->n_old; i++) {
		struct carry c = { .near = i >= m->n_old };

		if (map_carry(m->old_flows[i % m->n_old], flow_carry, &c))
			return fail("flows cannot be carried over: %s", strerror(errno));
	}
	return 0;
}

/* Before requests come to the new programs. 0, or -1 with why. */
static int maps_hand_over(struct maps *m)
{
	if (m->services_late) /* the others mean nothing without it, a mixture the wrong thing */
		unpin(map_names[SVC_MAP], 0);
	for (enum map i = TEXT_MAP; m->services_late && i < CT_MAP; i++)
		if (pin(m->fd[i], map_names[i], 0))
			return -1;
	m->services_late = false;
	if (m->n_old && !m->back && pin(m->fd[CT_MAP], "new_ct_map", 0))
		return -1;
	return flows_carry(m);
}

/* After that: what began meanwhile. 0, or -1 with why. */
static int maps_handed_over(const struct maps *m)
{
	if (m->n_old && syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0))
		usleep(100000); /* until no CPU is in an old program; the call is not there with nohz_full */
	return flows_carry(m);
}

/* Nobody needs the old flows any more. 0, or -1 with why. */
static int maps_done(struct maps *m)
{
	char new[PATH_MAX];

	if (!m->n_old)
		return 0;
	snprintf(new, sizeof(new), "%s", pin_path("new_ct_map", 0));
	if (m->back ? unlink(new) : rename(new, pin_path("ct_map", 0)))
		return fail("cannot pin ct_map: %s", strerror(errno));
	note("flows were carried over");
	while (m->n_old)
		close(m->old_flows[--m->n_old]);
	m->back = false;
	return 0;
}

/* The doors beside which others stay: towards the VPN that out; towards pods both. */
static int doors_put(const struct doorway *d, bool beside)
{
	return door_put(d, d->pods, beside) || (d->pods && door_put(d, false, beside)) ? -1 : 0;
}

/* Both doors of all that have none yet: towards the VPN, or towards pods. The one where
 * flows begin comes last: what it lets through finds its way. How many are to be tried again. */
static int doors_attach(struct doorway *all, int n)
{
	bool beside = maps.n_old;
	int failed = 0;

	if (flows_carry(&maps))
		return warn("%s; trying again", why), 1;
	for (struct doorway *d = all; d < all + n; d++) {
		d->halfway = false;
		if (!d->ifindex || d->attached)
			continue;
		d->halfway = !link_check(d);
		if (d->halfway && (door_note(d) || doors_put(d, beside))) {
			d->halfway = false;
			failed++;
		}
		if (!d->halfway)
			door_failed(d);
	}
	if (beside && failed)
		return failed;
	if (maps_hand_over(&maps))
		return warn("%s; trying again", why), 1;
	for (struct doorway *d = all; d < all + n; d++) {
		if (!d->halfway)
			continue;
		if (!d->pods && door_put(d, true, false)) {
			door_failed(d);
			failed++;
			continue;
		}
		d->attached = true;
		d->said = 0;
		note("attached to %s%s", d->name, d->pods ? ", for source NAT" : "");
		if (!beside)
			doors_unpin(d->ifindex, 2);
	}
	if (failed)
		return failed;
	if (maps_handed_over(&maps))
		return warn("%s; trying again", why), 1;
	for (struct doorway *d = all; beside && d < all + n; d++) {
		if (!d->attached)
			continue;
		if (maps.back && doors_put(d, false))
			return warn("interface %s: %s; trying again", d->name, why), 1;
		doors_unpin(d->ifindex, 2);
	}
	return maps_done(&maps) ? warn("%s; trying again", why), 1 : 0;
}

/* === kubeconfig ===========================================================
 * Where the API server is and who we are: a pod's service account, or a
 * kubeconfig, in JSON or in the YAML that kubectl and k3s write (block maps and
 * lists, plain and quoted scalars, {} and []), which is turned into JSON. All
 * files are looked at again before each request: rotation needs no signal. */
#define MAX_CONFIG	(1u << 20) /* bytes of a kubeconfig or of a file it names */
#define SERVICE_ACCOUNT "/var/run/secrets/kubernetes.io/serviceaccount/"

/* YAML becomes JSON line by line. */
struct yaml {
	struct yaml_open {
		int column;
		char close;
	} open[32]; /* the maps and lists we are in; the first is none, left of all */
	int n, line;
	bool wants; /* a value: behind a key or a dash there was none yet */
};

static int yaml_bad(const struct yaml *y)
{
	return fail("line %d: not YAML as kubectl writes it: \"key: value\" and \"- item\" "
		    "indented alike by spaces (no tab), each value on one line, plain, quoted, {} "
		    "or []", y->line);
}

/* Nothing more, or a comment. */
static bool yaml_rest(const char *s)
{
	s += strspn(s, " ");
	return !*s || *s == '#';
}

/* The scalar at s, a comment behind it left out. */
static int yaml_scalar(const struct yaml *y, const char *s, struct buf *out)
{
	static const char *const words[] = { "true", "false", "null", "{}", "[]" };
	char quote = *s == '"' || *s == '\'' ? *s++ : 0;
	size_t n = 0;

	while (s[n] && (quote ? s[n] != quote : s[n] != ' ' || s[n + 1] != '#'))
		n += quote == '"' && s[n] == '\\' && s[n + 1] ? 2 : 1;
	if (quote && (!s[n] || !yaml_rest(s + n + 1)))
		return yaml_bad(y);
	while (!quote && n && s[n - 1] == ' ')
		n--;
	for (size_t i = 0; i < ARRAY_SIZE(words) && !quote; i++)
		if (n == strlen(words[i]) && !memcmp(s, words[i], n)) {
			buf_add(out, s, n);
			return 0;
		}
	if (!quote && strchr("{}[]&*!|>%@`,", *s))
		return yaml_bad(y);
	buf_add(out, "\"", 1);
	for (; n--; s++) {
		if (quote != '"' && (*s == '"' || *s == '\\'))
			buf_add(out, "\\", 1);
		buf_add(out, s, 1);
	}
	buf_add(out, "\"", 1);
	return 0;
}

/* What stands at this column of a line: "key:", "- ", a scalar, or before it the
 * end of what is deeper; at -1 is the end of all. */
static int yaml_part(struct yaml *y, int column, const char *s, struct buf *out)
{
	bool dash = *s == '-' && (!s[1] || s[1] == ' '), begins;
	const char *colon = s, *rest; /* behind the key, or the dash itself */
	char close = dash ? ']' : '}';
	struct yaml_open *top;

	while (!dash && *colon && (*colon != ':' || (colon[1] && colon[1] != ' ')))
		colon = strchr("\"'{[#", *colon) ? "" : colon + 1;
	for (top = &y->open[y->n]; y->n; top = &y->open[--y->n]) {
		if (column > top->column || (column == top->column && (dash || top->close == '}')))
			break;
		buf_add(out, "null", y->wants ? 4 : 0);
		y->wants = false;
		buf_add(out, &top->close, 1);
	}
	if (column < 0)
		return 0;
	begins = column > top->column || top->close != close;
	if (begins ? !y->wants || y->n + 1 == ARRAY_SIZE(y->open) : !*colon)
		return yaml_bad(y);
	if (*colon && begins) {
		y->open[++y->n] = (struct yaml_open){ column, close };
		buf_add(out, dash ? "[" : "{", 1);
	} else if (*colon) {
		buf_printf(out, "%s,", y->wants ? "null" : "");
	}
	if (*colon && !dash)
		buf_printf(out, "\"%.*s\":", (int)(colon - s), s);
	rest = *colon ? colon + 1 + strspn(colon + 1, " ") : s;
	y->wants = yaml_rest(rest);
	if (y->wants)
		return 0;
	y->wants = dash;
	return dash ? yaml_part(y, column + (int)(rest - s), rest, out) : yaml_scalar(y, rest, out);
}

/* `text`, which is taken apart, as JSON. */
static int yaml_to_json(char *text, struct buf *out)
{
	struct yaml y = { .open = { { .column = -1 } }, .line = 1, .wants = true };

	for (char *next; *text; text = next, y.line++) {
		size_t n = strcspn(text, "\n"), column;

		next = text + n + (text[n] == '\n');
		while (n && strchr(" \r\t", text[n - 1]))
			n--;
		text[n] = 0;
		column = strspn(text, " ");
		if (yaml_rest(text) || (!out->len && !strcmp(text, "---")))
			continue;
		if (text[column] == '\t')
			return yaml_bad(&y);
		if (yaml_part(&y, column, text + column, out))
			return -1;
	}
	return yaml_part(&y, -1, "", out);
}

struct config {
	char origin[256]; /* the kubeconfig, or the service account's folder */
	char source[300]; /* "https://127.0.0.1:6443", for who reads it */
	char host[256];	  /* name or address, without brackets */
	char name[256];	  /* what the server's certificate must be made out to */
	char path[256];	  /* before each request's own, mostly "" */
	uint16_t port;
	bool tls;
	struct buf token;
	struct tls_trust *trust; /* NULL without TLS */
	struct {
		char path[256];
		uint64_t stamp;
	} files[5]; /* what was read */
	int n_files;
};

static void config_free(struct config *c)
{
	tls_trust_free(c->trust);
	buf_free(&c->token);
	*c = (struct config){ 0 };
}

/* Another file, or another content, has another. */
static uint64_t file_stamp(const struct stat *s)
{
	int64_t of[] = { s->st_dev, s->st_ino, s->st_size, s->st_mtim.tv_sec, s->st_mtim.tv_nsec };

	return hash64(0, of, sizeof(of));
}

/* Whether a file is another than when it was read. */
static bool config_changed(const struct config *c)
{
	struct stat now;

	for (int i = 0; i < c->n_files; i++)
		if (stat(c->files[i].path, &now) || file_stamp(&now) != c->files[i].stamp)
			return true;
	return false;
}

/* One reading of a kubeconfig. What fails first stays in `why`, and all that is
 * read after it is "". */
struct reading {
	struct config *c;
	struct json json;
	struct buf text[24]; /* all that was read */
	int n_text;
	bool bad;
};

static struct buf *reading_text(struct reading *r)
{
	struct buf *b = &r->text[r->n_text++];

	buf_add(b, "", 0);
	return b;
}

/* A whole file, remembered for config_changed. */
static struct buf *reading_file(struct reading *r, const char *path)
{
	struct buf *out = reading_text(r);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat seen = { 0 };
	ssize_t n = fd < 0 ? -1 : fstat(fd, &seen);

	snprintf(r->c->files[r->c->n_files].path, sizeof(r->c->files->path), "%s", path);
	r->c->files[r->c->n_files++].stamp = file_stamp(&seen);
	for (bool more = !n; more; more = n > 0 && out->len <= MAX_CONFIG) {
		buf_room(out, 4096);
		n = read(fd, out->at + out->len, 4096);
		out->len += n > 0 ? n : 0;
		out->at[out->len] = 0;
	}
	if (n < 0)
		r->bad = fail("%s: %s%s", path, strerror(errno),
			      errno == EACCES ? ": run as who may read it (root?)" : "");
	else if (out->len > MAX_CONFIG)
		r->bad = fail("%s: longer than %u bytes", path, MAX_CONFIG);
	if (fd >= 0)
		close(fd);
	return out;
}

static struct buf *reading_string(struct reading *r, int at, const char *key)
{
	int value = r->bad ? -1 : json_get(&r->json, at, key);
	struct buf *out = reading_text(r);

	if (value >= 0 && (json_str(&r->json, value, out) || strlen(out->at) != out->len))
		r->bad = fail("%s is no text", key);
	return out;
}

/* The `inner` of the element of `list` that `key` names. */
static int reading_refer(struct reading *r, int at, const char *key, const char *list,
			 const char *inner)
{
	const char *name = reading_string(r, at, key)->at;
	int all = json_get(&r->json, 0, list), i;

	for (i = json_first(&r->json, all); i >= 0; i = json_next(&r->json, all, i))
		if (json_eq(&r->json, json_get(&r->json, i, "name"), name))
			break;
	i = json_get(&r->json, i, inner);
	if (i < 0 && !r->bad)
		r->bad = fail("%s \"%s\" is not among its %s", key, name, list);
	return i;
}

/* The file that KEY names, seen from the kubeconfig; `path` becomes its name. */
static struct buf *reading_named(struct reading *r, int at, const char *key, char path[256])
{
	const char *origin = r->c->origin, *slash = strrchr(origin, '/');
	struct buf *name = reading_string(r, at, key);

	if (r->bad || !name->len)
		return name;
	snprintf(path, 256, "%.*s%s", *name->at == '/' || !slash ? 0 : (int)(slash + 1 - origin),
		 origin, name->at);
	return reading_file(r, path);
}

/* KEY-data (base64), else the file KEY names; empty if there is neither. */
static struct pem reading_pem(struct reading *r, int at, const char *key)
{
	struct pem pem;
	struct buf *data;
	char name[64];

	snprintf(name, sizeof(name), "%s-data", key);
	snprintf(pem.from, sizeof(pem.from), "%s of %s", name, r->c->origin);
	data = reading_string(r, at, name);
	pem.text = data->len ? reading_text(r) : reading_named(r, at, key, pem.from);
	if (data->len && !r->bad) {
		buf_room(pem.text, data->len);
		if (mbedtls_base64_decode((void *)pem.text->at, data->len, &pem.text->len,
					  (void *)data->at, data->len))
			r->bad = fail("%s: not base64", pem.from);
		pem.text->at[pem.text->len] = 0;
	}
	return pem;
}

/* "https://HOST[:PORT][/PATH]" */
static int config_server(struct config *c, const char *url)
{
	char scheme[8] = "", port[8] = "";
	int n = 0, m = 0;

	if (sscanf(url, "%7[a-z]://[%255[0-9a-fA-F:.]]%n", scheme, c->host, &n) != 2 || !n)
		sscanf(url, "%7[a-z]://%255[^][/:]%n", scheme, c->host, &n);
	sscanf(url + n, ":%6[0-9]%n", port, &m);
	c->tls = !strcmp(scheme, "https");
	c->port = *port ? atoi(port) : c->tls ? 443 : 80;
	snprintf(c->path, sizeof(c->path), "%s", url + n + m);
	for (size_t i = strlen(c->path); i && c->path[i - 1] == '/'; i--)
		c->path[i - 1] = 0;
	if (!n || (!c->tls && strcmp(scheme, "http")) || !c->port || atoi(port) > 65535 ||
	    (*c->path && *c->path != '/') || strpbrk(url, " ?#@\"\\") || strlen(url + n + m) > 255)
		return fail("server \"%s\" is no https://HOST[:PORT]", url);
	snprintf(c->source, sizeof(c->source), strchr(c->host, ':') ? "%s://[%s]:%d" : "%s://%s:%d",
		 scheme, c->host, c->port);
	return 0;
}

/* The cluster's entry: address, name to check, CA. */
static struct pem config_cluster(struct reading *r, int at)
{
	const char *url = reading_string(r, at, "server")->at;
	const char *name = reading_string(r, at, "tls-server-name")->at;
	struct pem ca = reading_pem(r, at, "certificate-authority");

	if (r->bad || (r->bad = config_server(r->c, url)))
		return ca;
	snprintf(r->c->name, sizeof(r->c->name), "%s", *name ? name : r->c->host);
	if (json_get(&r->json, at, "proxy-url") >= 0)
		r->bad = fail("proxy-url is not supported: name a server that is reached directly");
	else if (json_is_word(&r->json, json_get(&r->json, at, "insecure-skip-tls-verify"), "true"))
		r->bad = fail("insecure-skip-tls-verify is refused: give a certificate-authority");
	else if (r->c->tls && !ca.text->len)
		r->bad = fail("the cluster has no certificate-authority");
	return ca;
}

/* The user's token; what we cannot do is refused. */
static void config_user(struct reading *r, int at)
{
	static const char *const refused[] = { "exec", "auth-provider", "username", "as" };
	const struct buf *token;
	char path[256];
	const char *s;
	size_t n = 0;

	token = reading_named(r, at, "tokenFile", path);
	if (!token->len)
		token = reading_string(r, at, "token");
	for (s = token->at + strspn(token->at, " \t\r\n"); isgraph((unsigned char)s[n]); n++)
		;
	buf_add(&r->c->token, s, n);
	if (!r->bad && s + n + strspn(s + n, " \t\r\n") != token->at + token->len)
		r->bad = fail("the token holds a character that no token has");
	for (size_t i = 0; i < ARRAY_SIZE(refused) && !r->bad; i++)
		if (json_get(&r->json, at, refused[i]) >= 0)
			r->bad = fail("the user's \"%s\" is not supported: use a certificate or a "
				      "token", refused[i]);
}

/* current-context -> cluster and user. */
static void config_take(struct reading *r)
{
	int context = reading_refer(r, 0, "current-context", "contexts", "context");
	int cluster = reading_refer(r, context, "cluster", "clusters", "cluster");
	int user = json_get(&r->json, context, "user") < 0 ? -1 :
		reading_refer(r, context, "user", "users", "user");
	struct pem ca = config_cluster(r, cluster);
	struct pem cert = reading_pem(r, user, "client-certificate");
	struct pem key = reading_pem(r, user, "client-key");

	config_user(r, user);
	if (!r->bad && r->c->tls) {
		r->c->trust = tls_trust_new(&ca, &cert, &key);
		r->bad = !r->c->trust;
	}
}

/* The kubeconfig as JSON text. */
static struct buf *config_text(struct reading *r)
{
	const char *host = getenv("KUBERNETES_SERVICE_HOST");
	const char *port = getenv("KUBERNETES_SERVICE_PORT");
	struct buf *out = reading_text(r), *text;

	if (host && !strcmp(r->c->origin, SERVICE_ACCOUNT)) { /* what its folder stands for */
		buf_printf(out, "{\"contexts\":[{\"name\":\"\",\"context\":{\"user\":\"\"}}],"
			   "\"clusters\":[{\"name\":\"\",\"cluster\":{\"server\":"
			   "\"https://%s%s%s:%s\",\"certificate-authority\":\"ca.crt\"}}],"
			   "\"users\":[{\"name\":\"\",\"user\":{\"tokenFile\":\"token\"}}]}",
			   strchr(host, ':') ? "[" : "", host, strchr(host, ':') ? "]" : "",
			   port ? port : "443");
		return out;
	}
	text = reading_file(r, r->c->origin);
	if (r->bad || text->at[strspn(text->at, " \r\n\t")] == '{')
		return text;
	if (strlen(text->at) != text->len || !text->at[strspn(text->at, " \r\n\t")])
		r->bad = fail("this is neither YAML nor JSON");
	else
		r->bad = yaml_to_json(text->at, out);
	return out;
}

/* Which one: as DESIGN.md's command line says. */
static int config_find(char origin[256])
{
	const char *files[] = { "/var/lib/rancher/k3s/agent/kubeproxy.kubeconfig",
				"/etc/rancher/k3s/k3s.yaml",
				"/var/lib/rancher/rke2/agent/kubeproxy.kubeconfig", origin };
	bool pod = getenv("KUBERNETES_SERVICE_HOST") && !access(SERVICE_ACCOUNT "token", R_OK);

	if (opt.kubeconfig || pod) {
		const char *file = opt.kubeconfig ? opt.kubeconfig : SERVICE_ACCOUNT;

		return snprintf(origin, 256, "%s", file) < 256 ? 0 : fail("%s: too long", file);
	}
	snprintf(origin, 256, "%s/.kube/config", getenv("HOME") ? getenv("HOME") : "");
	for (size_t i = 0; i < ARRAY_SIZE(files); i++)
		if (!access(files[i], R_OK)) {
			memmove(origin, files[i], strlen(files[i]) + 1);
			return 0;
		}
	return fail("no kubeconfig: this is no pod, and none of %s, %s, %s, %s can be read: run as "
		    "root, or name one by --kubeconfig", files[0], files[1], files[2], origin);
}

/* Reads everything that `origin` leads to into *c, which is empty; -1 with why,
 * and *c is empty still. */
static int config_load(struct config *c, const char *origin)
{
	struct reading r = { .c = c };
	struct buf *text;

	snprintf(c->origin, sizeof(c->origin), "%s", origin);
	text = config_text(&r);
	if (!r.bad && !(r.bad = json_parse(&r.json, text->at, text->len)))
		config_take(&r);
	if (r.bad) {
		fail("%s: %s", origin, why);
		config_free(c);
	}
	free(r.json.tok);
	while (r.n_text)
		buf_free(&r.text[--r.n_text]);
	return r.bad ? -1 : 0;
}
/* === the API server =======================================================
 * One watch per kind of object, each with its own connection: list (or stream)
 * into the model between model_mark and model_sweep, then follow. Whatever goes
 * wrong is said once, and tried again with growing, jittered pauses; meanwhile
 * the model keeps its last good state.
 *
 * First in pages, which costs the server half of the CPU that a stream takes; anew as a stream,
 * of which etcd hears nothing: a server that comes back has all others to answer too. */

#define LIST_PAGE     500    /* objects asked for at once; the server's memory, not ours */
#define MAX_REFUSAL   4096   /* bytes kept of an error's text */
#define MAX_ADDRESSES 8	     /* of a server's name */
#define WAIT_CONNECT  10000  /* ms: name; TCP and TLS, each address */
#define WAIT_ANSWER   60000  /* ms until an answer begins */
#define WAIT_BODY     30000  /* ms without a byte of a list */
#define WAIT_STREAM   5000   /* ms until initial events; some servers do not know them */
#define WAIT_LIST     300000 /* ms for one whole list, all its pages */
#define WAIT_CIDRS    5000   /* the same of ServiceCIDRs: the first sync waits */
#define PROVEN	      5000   /* ms a watch must last to count as a success */
#define PAUSE_LEAST   200
#define PAUSE_MOST    30000
#define PAUSE_BUSY    60000  /* where Retry-After asks for a minute or more */
#define PAUSE_DENIED  600000 /* PAUSE_MOST of what we can do without and may not have */

/* Neither of kube-proxy's two labels. */
#define SELECTOR "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name" \
		 "%2C%21service.kubernetes.io%2Fheadless"

static const struct resource {
	const char *word, *path, *select;
	int most; /* ms for one whole list */
} resources[N_KINDS] = {
	[SERVICES] = { "services", "/api/v1/services", SELECTOR, WAIT_LIST },
	[SLICES] = { "endpointslices", "/apis/discovery.k8s.io/v1/endpointslices", SELECTOR,
		     WAIT_LIST },
	[NODES] = { "nodes", "/api/v1/nodes", "fieldSelector=metadata.name%3D", WAIT_LIST },
	[SERVICE_CIDRS] = { "servicecidrs", "/apis/networking.k8s.io/v1/servicecidrs", "",
			    WAIT_CIDRS },
};

enum watch_state {
	WATCH_RESTING,	  /* nothing is open; goes on at the deadline */
	WATCH_RESOLVING,  /* a child looks the server's name up and answers through `pipe` */
	WATCH_CONNECTING, /* tls is on its way to addrs[addr] */
	WATCH_ASKING,	  /* tls is open; `text` is to be sent, then an answer's head comes */
	WATCH_REFUSED,	  /* an error's body comes into `text` */
	WATCH_PROBING,	  /* a list of one object comes: only its resourceVersion counts */
	WATCH_LISTING,	  /* a page of a list comes into the model */
	WATCH_STREAMING,  /* the list comes as events; a bookmark will end it */
	WATCH_FOLLOWING,  /* the model is complete, rv says up to where; events change it */
};

/* What is asked; LIST and STREAM begin from nothing, the others need rv. */
enum watch_ask { ASK_STREAM, ASK_LIST, ASK_PROBE, ASK_WATCH };

struct watch {
	enum watch_state state;
	enum watch_ask ask;
	enum kind kind;
	int64_t since, deadline; /* of the state */
	int64_t begun;		 /* when the list's first page was asked for */
	int64_t until;		 /* when the server should have ended the watch */
	int64_t least;		 /* of the next pause */
	unsigned failures;	 /* in a row */
	bool listed;		 /* once: from then on as a stream */
	bool watched;		 /* once: the server let us */
	bool no_stream;		 /* the server cannot stream a list */
	bool no_pages;		 /* paging was too slow for it: all in one */
	bool lost;		 /* cut off, or could not connect: the server may be another by now */
	bool whole;		 /* the list's end was read */
	bool reused;		 /* the connection had an answer before */
	char rv[64];		 /* resume from here; "": list first */
	struct buf more;	 /* the next page's token */
	struct buf text;	 /* a request, of which `sent` bytes are on their way */
	size_t sent;
	struct in6_addr addrs[MAX_ADDRESSES];
	int n_addrs, addr;
	int pipe;	/* 0: none */
	uint32_t armed; /* what epoll waits for, 0: not in it */
	struct tls tls;
	struct http http;
	struct split split;
};

struct api {
	bool once;    /* list only, and give up at the first failure */
	char *failed; /* once: why */
	struct config config;
	struct watch watch[N_KINDS];
	int epoll_fd;
	uint32_t tag;
	int64_t now;
	struct json json;
	unsigned troubled; /* a bit per kind: has said a failure that is not over */
	uint64_t said[16]; /* hashes of what was said since all was well, a ring */
	unsigned n_said;
};

/* What reading returns: go on, `why` says what failed, or try again without a word. */
enum { FAILED = -1, GO_ON, AGAIN };

/* Says `why`, with more, once until all is well again. */
static void api_say(struct api *a, const char *more)
{
	uint64_t h = hash64(0, why, strlen(why));

	for (unsigned i = 0; i < ARRAY_SIZE(a->said); i++)
		if (a->said[i] == h)
			return;
	a->said[a->n_said++ % ARRAY_SIZE(a->said)] = h;
	warn("%s%s", why, more);
}

static uint32_t random_bits(void)
{
	uint32_t bits = 0;

	getrandom(&bits, sizeof(bits), GRND_NONBLOCK);
	return bits;
}

/* ms to wait after so many failures in a row: doubled by each, and jittered. */
static int64_t pause_after(unsigned failures)
{
	int64_t pause = PAUSE_LEAST << (failures < 8 ? failures : 8);

	pause = pause < PAUSE_MOST ? pause : PAUSE_MOST;
	return pause / 2 + random_bits() % (pause / 2 + 1);
}

static void watch_enter(struct api *a, struct watch *w, enum watch_state state, int64_t wait)
{
	static const char *const names[] = { "resting", "resolving", "connecting",
					     "asking",	"refused",   "probing",
					     "listing", "streaming", "following" };

	debug("%s: %s after %" PRId64 " ms, for at most %" PRId64, resources[w->kind].word,
	      names[state], a->now - w->since, wait);
	w->state = state;
	w->since = a->now;
	w->deadline = a->now + wait;
}

/* Asks epoll for what the state waits for. */
static void watch_arm(struct api *a, struct watch *w)
{
	struct epoll_event e = { .events = w->pipe ? EPOLLIN : w->tls.want };

	e.data.u32 = a->tag + w->kind;
	if (e.events != w->armed)
		epoll_ctl(a->epoll_fd, w->armed ? EPOLL_CTL_MOD : EPOLL_CTL_ADD,
			  w->pipe ? w->pipe : w->tls.fd, &e);
	w->armed = e.events;
}

/* Nothing stays open. epoll is told, for a child may still hold the socket. */
static void watch_close(struct api *a, struct watch *w)
{
	if (w->armed)
		epoll_ctl(a->epoll_fd, EPOLL_CTL_DEL, w->pipe ? w->pipe : w->tls.fd, NULL);
	w->armed = 0;
	if (w->pipe)
		close(w->pipe);
	w->pipe = 0;
	w->reused = false;
	tls_close(&w->tls);
	http_reset(&w->http);
	split_free(&w->split);
	buf_free(&w->text);
}

/* Closes, and goes on after a pause that doubles with each failure in a row; the
 * first time at once if `eager`. */
static void watch_pause(struct api *a, struct watch *w, bool eager)
{
	int64_t pause = eager && !w->failures ? 0 : pause_after(w->failures);

	w->failures++;
	if (w->ask == ASK_WATCH && w->state >= WATCH_ASKING && w->failures > 4)
		w->rv[0] = 0; /* nothing comes of it */
	buf_free(&w->more);
	watch_close(a, w);
	watch_enter(a, w, WATCH_RESTING, pause > w->least ? pause : w->least);
	w->least = 0;
}

/* `why` is what happened. */
static void watch_fail(struct api *a, struct watch *w)
{
	fail("%s: %s", a->config.source, why);
	if (!a->once)
		api_say(a, "; trying again");
	else if (w->kind == SERVICE_CIDRS)
		api_say(a, "; going on without them");
	else if (!a->failed && (!w->least || w->failures > 4)) /* a busy server is asked again */
		a->failed = strdup(why);
	a->troubled |= 1 << w->kind;
	w->lost |= w->state == WATCH_FOLLOWING;
	for (int k = 0; k < N_KINDS && w->state < WATCH_ASKING; k++) {
		a->watch[k].lost = true; /* it may come back as another, with another etcd */
		a->watch[k].no_stream = false;
	}
	watch_pause(a, w, false);
}

/* The watch works: what was said before may be said again. */
static void watch_healed(struct api *a, struct watch *w)
{
	w->failures = 0;
	w->lost = false;
	if (!(a->troubled & 1 << w->kind) || (a->troubled &= ~(1 << w->kind)))
		return;
	note("%s: in touch again", a->config.source);
	memset(a->said, 0, sizeof(a->said));
}

static void escape(struct buf *out, const char *s)
{
	for (const unsigned char *c = (const void *)s; *c; c++)
		buf_printf(out, isalnum(*c) || strchr("-._~", *c) ? "%c" : "%%%02X", *c);
}

static void watch_write(struct api *a, struct watch *w)
{
	while (w->sent < w->text.len) {
		ssize_t n = tls_write(&w->tls, w->text.at + w->sent, w->text.len - w->sent);

		if (n < 0)
			return watch_fail(a, w);
		if (!n)
			return watch_arm(a, w);
		w->sent += n;
	}
	w->tls.want = EPOLLIN;
	watch_arm(a, w);
}

/* The connection is open and free: what is to be asked now? */
static void watch_request(struct api *a, struct watch *w)
{
	const struct resource *r = &resources[w->kind];
	struct buf target = { 0 };
	unsigned seconds = 300 + random_bits() % 300;
	int64_t left;

	w->until = a->now + (seconds + 30) * 1000;
	if (*w->rv)
		w->ask = w->lost ? ASK_PROBE : ASK_WATCH;
	else
		w->ask = w->listed && !w->no_stream ? ASK_STREAM : ASK_LIST;
	buf_printf(&target, "%s%s?%s", a->config.path, r->path, r->select);
	if (w->kind == NODES)
		escape(&target, opt.node);
	if (w->ask == ASK_PROBE)
		buf_printf(&target, "&limit=1");
	else if (w->ask != ASK_LIST)
		buf_printf(&target, "&watch=true&allowWatchBookmarks=true&timeoutSeconds=%u%s",
			   seconds, w->ask == ASK_WATCH ? "&resourceVersion=" :
			   "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan");
	else if (!w->no_pages)
		buf_printf(&target, "&limit=%d%s", LIST_PAGE, w->more.len ? "&continue=" : "");
	escape(&target, w->ask == ASK_WATCH ? w->rv : w->more.len ? w->more.at : "");
	http_reset(&w->http);
	w->text.len = w->sent = 0;
	http_get(&w->text, strstr(a->config.source, "//") + 2, target.at,
		 a->config.tls ? a->config.token.at : NULL);
	buf_free(&target);
	w->begun = w->more.len ? w->begun : a->now;
	left = w->begun + r->most - a->now;
	watch_enter(a, w, WATCH_ASKING, left < WAIT_ANSWER ? left : WAIT_ANSWER);
	watch_write(a, w);
}

/* To the next of the server's addresses that does not fail at once. */
static void watch_connect(struct api *a, struct watch *w)
{
	const struct config *c = &a->config;

	watch_close(a, w);
	watch_enter(a, w, WATCH_CONNECTING, WAIT_CONNECT);
	for (; w->addr < w->n_addrs; w->addr++)
		if (!tls_connect(&w->tls, c->trust, &w->addrs[w->addr], c->port, c->name))
			return watch_arm(a, w);
	watch_fail(a, w);
}

/* The first address may be one that connects and does no more: each failure begins with the
 * next one. */
static void watch_connect_first(struct api *a, struct watch *w)
{
	struct in6_addr all[2 * MAX_ADDRESSES];

	for (int i = 0; i < 2 * w->n_addrs; i++)
		all[i] = w->addrs[i % w->n_addrs];
	memcpy(w->addrs, all + w->failures % w->n_addrs, w->n_addrs * sizeof(*all));
	w->addr = 0;
	watch_connect(a, w);
}

/* `why` is what is wrong with this address: on to the next one. */
static void watch_connect_next(struct api *a, struct watch *w)
{
	char text[INET6_ADDRSTRLEN];

	if (w->n_addrs > 1)
		fail("%s: %s", addr_text(&w->addrs[w->addr], text), why);
	w->addr++;
	watch_connect(a, w);
}

/* In a child, for getaddrinfo blocks: the addresses of `host` into fd. It holds
 * nothing else of ours open, neither connections nor the lock. */
static void resolve_name(const char *host, int fd)
{
	struct addrinfo how = { .ai_family = AF_INET6, .ai_socktype = SOCK_STREAM };
	struct addrinfo *i = NULL;
	struct in6_addr all[MAX_ADDRESSES];
	size_t n = 0;

	alarm(WAIT_CONNECT / 1000);
	dup2(fd, 0);
	syscall(SYS_close_range, 1, ~0u, 0);
	how.ai_flags = AI_V4MAPPED | AI_ALL;
	if (!getaddrinfo(host, NULL, &how, &i))
		for (; i && n < MAX_ADDRESSES; i = i->ai_next)
			all[n++] = ((struct sockaddr_in6 *)i->ai_addr)->sin6_addr;
	_exit(write(0, all, n * sizeof(*all)) < 0);
}

static void watch_resolved(struct api *a, struct watch *w)
{
	ssize_t n = read(w->pipe, w->addrs, sizeof(w->addrs));

	w->n_addrs = n > 0 ? n / sizeof(*w->addrs) : 0;
	if (w->n_addrs)
		return watch_connect_first(a, w);
	fail("the name %s has no address: ask DNS, or /etc/hosts", a->config.host);
	watch_fail(a, w);
}

static void watch_connect_new(struct api *a, struct watch *w)
{
	const char *host = a->config.host;
	int fds[2] = { 0, -1 }, child;

	watch_close(a, w);
	w->n_addrs = addr_parse(host, strlen(host), w->addrs);
	if (!strcmp(host, "localhost"))
		w->n_addrs = addr_parse("127.0.0.1", 9, &w->addrs[0]) +
			addr_parse("::1", 3, &w->addrs[1]);
	if (w->n_addrs)
		return watch_connect_first(a, w);
	watch_enter(a, w, WATCH_RESOLVING, WAIT_CONNECT * 2);
	child = pipe2(fds, O_CLOEXEC | O_NONBLOCK) ? -1 : fork();
	if (!child)
		resolve_name(host, fds[1]);
	if (child < 0)
		fail("cannot look %s up: %s", host, strerror(errno));
	close(fds[1]);
	w->pipe = fds[0];
	if (child < 0)
		return watch_fail(a, w);
	watch_arm(a, w);
}

/* If other credentials are on disk, all connections begin anew with them. */
static void api_reload(struct api *a)
{
	struct config next = { 0 };
	bool same;

	if (!config_changed(&a->config))
		return;
	if (config_load(&next, a->config.origin))
		return api_say(a, "; what was read before is used on");
	same = !strcmp(next.source, a->config.source);
	for (struct watch *w = a->watch; w < a->watch + N_KINDS; w++) {
		if (!same)
			w->rv[0] = w->more.len = 0;
		if (w->state == WATCH_RESTING)
			continue;
		watch_close(a, w);
		watch_enter(a, w, WATCH_RESTING, 0);
	}
	config_free(&a->config);
	a->config = next;
}

/* The next request, on the open connection if there is one. */
static void watch_go(struct api *a, struct watch *w)
{
	api_reload(a);
	w->reused = w->tls.state == TLS_OPEN;
	if (w->reused)
		watch_request(a, w);
	else
		watch_connect_new(a, w);
}

/* The model has all there was at `rv`. */
static void watch_complete(struct api *a, struct model *m, struct watch *w)
{
	model_sweep(m, w->kind);
	w->listed = true;
	w->no_pages = w->lost = false;
	json_reset(&a->json);
	if (a->once && w->kind < NODES && m->synced[SERVICES] && m->synced[SLICES])
		/* last, for their absence is no failure */
		a->watch[NODES].deadline = a->watch[SERVICE_CIDRS].deadline = a->now;
}

static void watch_follow(struct api *a, struct watch *w)
{
	w->watched = true;
	watch_enter(a, w, WATCH_FOLLOWING, w->until - a->now);
	if (w->failures || a->troubled & 1 << w->kind)
		w->deadline = a->now + PROVEN;
}

/* An answer's head: a 200's body is what was asked for. */
static int watch_head(struct api *a, struct model *m, struct watch *w)
{
	static const enum watch_state next[] = { WATCH_STREAMING, WATCH_LISTING, WATCH_PROBING };
	bool list = w->ask == ASK_LIST || w->ask == ASK_PROBE;

	if (w->http.status == 200 && *w->http.type &&
	    strncasecmp(w->http.type, "application/json", 16))
		return fail("the answer is %s, not JSON: is this the API server, or a portal?",
			    w->http.type);
	split_free(&w->split);
	w->split = (struct split){ .shape = list ? SPLIT_LIST : SPLIT_EVENTS };
	w->text.len = 0;
	w->whole = false;
	if (w->http.status != 200) {
		watch_enter(a, w, WATCH_REFUSED, WAIT_BODY);
	} else if (w->ask == ASK_WATCH) {
		watch_follow(a, w);
	} else {
		if (w->ask != ASK_PROBE && !w->more.len)
			model_mark(m, w->kind);
		watch_enter(a, w, next[w->ask], list ? WAIT_BODY : WAIT_STREAM);
	}
	return GO_ON;
}

/* metadata.resourceVersion, "" if it has none that we can keep. */
static const char *object_rv(const struct json *j, int object, char rv[64])
{
	int at = json_get(j, json_get(j, object, "metadata"), "resourceVersion");
	int n = json_is(j, at, JSMN_STRING) ? j->tok[at].end - j->tok[at].start : 64;

	rv[0] = 0;
	if (n < 64)
		snprintf(rv, 64, "%.*s", n, j->text + j->tok[at].start);
	return rv;
}

/* What is wrong with an object is said once, not at each resync. */
static void watch_put(struct model *m, struct watch *w, const struct json *j, int object)
{
	if (model_put(m, w->kind, j, object) && !m->repeated)
		warn("%s", why);
}

/* Why the server does not do what was asked, with its own words if it has any;
 * `status` is a Status in a->json, or something else. */
static int watch_explain(struct api *a, struct watch *w, int code, int status)
{
	const char *word = resources[w->kind].word;
	const char *verb = w->ask == ASK_LIST || w->ask == ASK_PROBE ? "list" : "watch";
	struct buf words = { 0 };

	buf_printf(&words, " (");
	if (!a->json.n_tok || json_str(&a->json, json_get(&a->json, status, "message"), &words) ||
	    words.len == 2)
		words.at[0] = 0;
	else
		buf_printf(&words, ")");
	if (code == 401)
		fail("401: the server does not accept who we are (to %s %s): is the token or "
		     "certificate of %s still good, and for this cluster?%s", verb, word,
		     a->config.origin, words.at);
	else if (code == 403)
		fail("403: we may not %s %s: RBAC must grant get, list and watch on services, "
		     "endpointslices.discovery.k8s.io and nodes%s", verb, word, words.at);
	else if (code >= 300 && code < 400)
		fail("%d: we are sent on to \"%s\" and do not follow: name the API server itself "
		     "in %s", code, w->http.location, a->config.origin);
	else if (w->state == WATCH_FOLLOWING)
		fail("the server ended the watch of %s: %d%s", word, code, words.at);
	else
		fail("%d: the server does not %s %s%s", code, verb, word, words.at);
	buf_free(&words);
	return FAILED;
}

/* The server says no, by an answer's status or by an ERROR event. */
static int watch_denied(struct api *a, struct model *m, struct watch *w, int code, int status)
{
	if (code == 410 || json_eq(&a->json, json_get(&a->json, status, "reason"), "Expired")) {
		debug("%s: %d, its history is gone", resources[w->kind].word, code);
		w->no_pages |= w->more.len > 0;
		w->rv[0] = 0;
		return AGAIN;
	}
	if (w->state == WATCH_STREAMING || /* etcd 3.4 cannot */
	    (w->ask == ASK_STREAM && (code == 400 || code == 422 || code == 500))) {
		w->no_stream = true;
		return AGAIN;
	}
	if (code == 403 && w->watched && w->failures < 5)
		return AGAIN; /* a server that has just started does not know its RBAC yet */
	if (code == 429 || code == 503)
		w->least = w->http.retry_after < 60 ? w->http.retry_after * 1000 + 1 : PAUSE_BUSY;
	watch_explain(a, w, code, status);
	if (w->kind < NODES || (code != 403 && (code != 404 || w->kind != SERVICE_CIDRS)))
		return FAILED;
	if (w->kind == NODES) { /* older servers have no ServiceCIDRs, older roles no right to them */
		fail("%s: %s", a->config.source, why);
		api_say(a, "; going on without the zone of our node");
	}
	a->troubled &= ~(1 << w->kind);
	if (!m->synced[w->kind]) {
		model_mark(m, w->kind);
		watch_complete(a, m, w);
	}
	w->least = PAUSE_LEAST << (w->failures < 16 ? w->failures : 16);
	w->least = w->least < PAUSE_DENIED ? w->least : PAUSE_DENIED;
	return AGAIN;
}

static int watch_event(struct api *a, struct model *m, struct watch *w)
{
	const struct json *j = &a->json;
	int type = json_get(j, 0, "type"), object = json_get(j, 0, "object");
	int kind = json_get(j, object, "kind"), notes;
	long code = 0;
	char rv[64];

	if (json_eq(j, type, "ERROR")) {
		json_int(j, json_get(j, object, "code"), 0, 999, &code);
		return watch_denied(a, m, w, code, object);
	}
	object_rv(j, object, rv);
	if (kind >= 0 && !json_eq(j, kind, kinds[w->kind].name)) {
		fail("%s: an event with an object of another kind", resources[w->kind].word);
		api_say(a, " is left out");
	} else if (json_eq(j, type, "ADDED") || json_eq(j, type, "MODIFIED")) {
		watch_put(m, w, j, object);
	} else if (json_eq(j, type, "DELETED")) {
		model_delete(m, w->kind, j, object);
	} else if (!json_eq(j, type, "BOOKMARK")) {
		fail("%s: an event of unknown type", resources[w->kind].word);
		api_say(a, " is left out");
	} else if (w->state == WATCH_STREAMING && *rv) {
		notes = json_get(j, json_get(j, object, "metadata"), "annotations");
		if (json_eq(j, json_get(j, notes, "k8s.io/initial-events-end"), "true")) {
			watch_complete(a, m, w);
			watch_follow(a, w);
		}
	}
	if (w->state == WATCH_FOLLOWING && *rv)
		memcpy(w->rv, rv, sizeof(rv));
	return GO_ON;
}

/* A list's end: what stood around its items. */
static int watch_list(struct api *a, struct model *m, struct watch *w)
{
	const struct json *j = &a->json;
	char kind[32], rv[64];

	snprintf(kind, sizeof(kind), "%sList", kinds[w->kind].name);
	if (!json_eq(j, json_get(j, 0, "kind"), kind) || !*object_rv(j, 0, rv))
		return fail("the answer is no %s with a resourceVersion", kind);
	w->whole = true;
	if (w->state == WATCH_PROBING) {
		if (strtoull(rv, NULL, 10) < strtoull(w->rv, NULL, 10))
			w->rv[0] = 0; /* its past is not ours: from an older backup, or anew */
		w->lost = false;
		return GO_ON;
	}
	w->more.len = 0;
	json_str(j, json_get(j, json_get(j, 0, "metadata"), "continue"), &w->more);
	if (w->more.len)
		return GO_ON;
	memcpy(w->rv, rv, sizeof(rv));
	watch_complete(a, m, w);
	return GO_ON;
}

/* A piece of the body. */
static int watch_body(struct api *a, struct model *m, struct watch *w, const char *at, size_t n)
{
	size_t room = MAX_REFUSAL - w->text.len;
	enum split_got got;
	int r = GO_ON;

	if (w->state == WATCH_REFUSED) {
		buf_add(&w->text, at, n < room ? n : room);
		return GO_ON;
	}
	while (r == GO_ON && (got = split_feed(&w->split, &at, &n)) != SPLIT_MORE) {
		if (got == SPLIT_BAD)
			return fail("the %s are no JSON: %s", resources[w->kind].word, why);
		if (got == SPLIT_ITEM && w->state == WATCH_PROBING)
			continue;
		/* what is no good about it, model_put will say, for it can name it */
		json_take(&a->json, &w->split);
		if (w->split.shape == SPLIT_EVENTS)
			r = watch_event(a, m, w);
		else if (got == SPLIT_HEAD)
			r = watch_list(a, m, w);
		else
			watch_put(m, w, &a->json, 0);
	}
	return r;
}

/* The answer is whole. `clean`: nothing stands behind it. */
static int watch_end(struct api *a, struct model *m, struct watch *w, bool clean)
{
	if (w->state == WATCH_REFUSED) {
		json_parse(&a->json, w->text.at ? w->text.at : "", w->text.len);
		return watch_denied(a, m, w, w->http.status, 0);
	}
	if (w->state != WATCH_FOLLOWING && !w->whole)
		return fail("the answer to listing %s ends before the list does",
			    resources[w->kind].word);
	if (w->state == WATCH_FOLLOWING && !split_idle(&w->split))
		return fail("the answer about %s ends in the middle of an event",
			    resources[w->kind].word);
	if (a->once && !w->more.len)
		w->least = INT32_MAX; /* that was all */
	if (w->state == WATCH_FOLLOWING && m->full[w->kind])
		w->rv[0] = 0; /* there may be room now */
	if (w->state == WATCH_FOLLOWING && a->now - w->since < PROVEN && w->failures > 4)
		return fail("the server ends the watch of %s at once", resources[w->kind].word);
	if (w->least || (w->state == WATCH_FOLLOWING && a->now - w->since < PROVEN))
		return AGAIN;
	if (!w->http.keeps || !clean)
		watch_close(a, w);
	watch_go(a, w);
	return GO_ON;
}

/* Some bytes of an answer, or none: the connection ended. False: it is not to be read on. */
static bool watch_bytes(struct api *a, struct model *m, struct watch *w, const char *at, size_t n)
{
	const char *body = NULL;
	size_t body_n = 0;
	struct http *h = &w->http;
	bool closed = !n;
	int r = GO_ON;

	while (r == GO_ON) {
		switch (closed ? http_eof(h) : http_feed(h, &at, &n, &body, &body_n)) {
		case HTTP_MORE:
			return true;
		case HTTP_HEAD:
			r = watch_head(a, m, w);
			break;
		case HTTP_BODY:
			r = watch_body(a, m, w, body, body_n);
			break;
		case HTTP_END:
			r = watch_end(a, m, w, !n && !closed);
			if (r == GO_ON)
				return false;
			break;
		case HTTP_BAD:
			r = FAILED;
		}
	}
	if (r == AGAIN)
		watch_pause(a, w, true);
	else
		watch_fail(a, w);
	return false;
}

/* Reads what there is, but lets others have their turn after a megabyte. */
static void watch_read(struct api *a, struct model *m, struct watch *w)
{
	static char bytes[16384];
	int64_t late, most;

	for (int i = 0; i < 64 || tls_holds(&w->tls); i++) {
		ssize_t n = tls_read(&w->tls, bytes, sizeof(bytes));

		if (!n)
			break;
		if (n < 0 && w->reused && w->state == WATCH_ASKING) /* it ended in between */
			return watch_connect_new(a, w);
		if (n == -1)
			return watch_fail(a, w);
		if (!watch_bytes(a, m, w, bytes, n > 0 ? n : 0))
			return;
		late = a->now + (w->state == WATCH_STREAMING ? WAIT_STREAM : WAIT_BODY);
		most = w->begun + resources[w->kind].most;
		if (w->state > WATCH_ASKING && w->state < WATCH_FOLLOWING)
			w->deadline = late < most ? late : most;
	}
	watch_arm(a, w);
}

/* --- what the loop calls --------------------------------------------------- */

/* Finds and reads the credentials: 0, or -1 with why. */
static int api_open(struct api *a)
{
	char origin[256];

	return config_find(origin) || config_load(&a->config, origin) ? -1 : 0;
}

/* "https://127.0.0.1:6443" */
static const char *api_source(const struct api *a)
{
	return a->config.source;
}

/* After api_open. From now on epoll events with data.u32 = tag + kind belong
 * to api_ready, and api_deadline is to be kept. */
static void api_start(struct api *a, int epoll_fd, uint32_t tag)
{
	signal(SIGCHLD, SIG_IGN); /* nobody waits for resolve_name */
	a->epoll_fd = epoll_fd;
	a->tag = tag;
	a->now = now_ms();
	for (int k = 0; k < N_KINDS; k++) {
		a->watch[k].kind = k;
		a->watch[k].since = a->now;
		a->watch[k].deadline = a->once && k >= NODES ? INT64_MAX : a->now;
	}
}

/* When api_tick is to be called, in ms of now_ms(). */
static int64_t api_deadline(const struct api *a)
{
	int64_t first = INT64_MAX;

	for (int k = 0; k < N_KINDS; k++)
		if (a->watch[k].deadline < first)
			first = a->watch[k].deadline;
	return first;
}

/* The descriptor of this kind's watch is ready. */
static void api_ready(struct api *a, struct model *m, enum kind kind, uint32_t events)
{
	struct watch *w = &a->watch[kind];
	int r;

	(void)events; /* an error shows in what is tried */
	a->now = now_ms();
	if (w->state == WATCH_RESTING)
		return;
	if (w->state == WATCH_RESOLVING)
		return watch_resolved(a, w);
	if (w->state == WATCH_ASKING && w->sent < w->text.len)
		return watch_write(a, w);
	if (w->state != WATCH_CONNECTING)
		return watch_read(a, m, w);
	r = tls_progress(&w->tls);
	if (r > 0)
		watch_request(a, w);
	else if (r < 0)
		watch_connect_next(a, w);
	else
		watch_arm(a, w);
}

/* A state has lasted as long as it may. */
static void watch_late(struct api *a, struct watch *w)
{
	const struct resource *r = &resources[w->kind];

	if (w->state == WATCH_RESTING)
		return watch_go(a, w);
	if (w->state == WATCH_STREAMING) {
		w->no_stream = true;
		return watch_pause(a, w, true);
	}
	if (w->state == WATCH_FOLLOWING && a->now < w->until) {
		w->deadline = w->until;
		return watch_healed(a, w);
	}
	if (w->state == WATCH_CONNECTING) {
		fail("no answer within %d s: check the address, the way to it, and firewalls",
		     WAIT_CONNECT / 1000);
		return watch_connect_next(a, w);
	}
	if (w->more.len && a->now >= w->begun + r->most)
		fail("the list of %s does not end within %d s", r->word, r->most / 1000);
	else
		fail("the server does not go on answering about %s", r->word);
	watch_fail(a, w);
}

static void api_tick(struct api *a, int64_t now)
{
	a->now = now;
	for (int k = 0; k < N_KINDS; k++)
		if (a->watch[k].deadline <= now)
			watch_late(a, &a->watch[k]);
}

/* Closes everything. */
static void api_stop(struct api *a)
{
	for (int k = 0; k < N_KINDS; k++) {
		watch_close(a, &a->watch[k]);
		buf_free(&a->watch[k].more);
	}
	config_free(&a->config);
	free(a->json.tok);
	free(a->failed);
	*a = (struct api){ 0 };
}
/* === tailscaled (its local API) ===========================================
 * --advertise: every range of services is among the routes that this node advertises. To be
 * told when somebody changes them (k3s's vpn-auth sets its own at each start) we follow
 * tailscaled's bus, whose first message has the preferences too: HTTP over a unix socket.
 * What others advertise keeps its place and its spelling.
 *
 * Files in the pin directory say what is to be undone, and are there before it is done:
 *   route_RANGE   it was us who added it; RANGE with - for a dot and _ for the slash
 *   routes_null   without us there was no list at all, rather than an empty one */
#define WATCH_PREFS  "watch-ipn-bus?mask=260" /* NotifyInitialPrefs; and NotifyRateLimit, for
						 the net maps that come too */
#define EDIT_ROUTES  "{\"AdvertiseRoutesSet\":true,\"AdvertiseRoutes\":"
#define MAX_WORDS    256   /* bytes kept of an error's text */
#define WAIT_LOCAL   10000 /* ms until tailscaled answers */
#define REPAIR_LEAST 1000  /* ms from one repair to the next, if somebody else insists */
#define ABSENT	     (-2)

struct call { /* all zero: none */
	int fd;
	struct http http;
	struct split split;
	struct buf words; /* of an error */
};

struct advert {
	char text[INET6_ADDRSTRLEN + 8]; /* "10.43.0.0/16", with its quotes, as JSON has it */
};

#define ROUTES_EACH(r, b) \
	for (const struct advert *r = (void *)(b)->at, *end = r + (b)->len / sizeof(*r); r < end; r++)

/* What is to become of the routes that tailscaled advertises. */
struct routes {
	struct buf edit;	/* JSON that says it; empty: they are good as they are */
	struct buf added, gone; /* struct advert */
	bool null, ours;	/* there is no list; there is one with a route that we added */
};

struct tailscaled {
	struct buf want; /* struct advert */
	bool sure;	 /* what we added and is not in `want` is to go */
	bool seen;	 /* the bus has told the preferences */
	struct call bus, edit;
	struct routes todo, doing; /* doing: by `edit` */
	struct json json;
	int64_t deadline; /* of what is awaited or put off; INT64_MAX: nothing is */
	int64_t edited;
	unsigned failures; /* in a row */
	uint64_t said;	   /* a hash of the last one */
	int epoll_fd;
	uint32_t tag;
};

static void call_close(struct call *c)
{
	if (c->fd > 0)
		close(c->fd);
	http_reset(&c->http);
	split_free(&c->split);
	buf_free(&c->words);
	*c = (struct call){ 0 };
}

/* Sends a request: 0, or ABSENT or -1 with why. */
static int call_open(struct call *c, const char *method, const char *target, const char *body)
{
	static const char *const paths[] = { "/var/run/tailscale/tailscaled.sock",
					     "/run/tailscale/tailscaled.sock" };
	const char *path = getenv("TS_SOCKET");
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	struct buf text = { 0 };
	int r = 0;

	if (!path || !*path)
		path = paths[access(paths[0], F_OK) && !access(paths[1], F_OK)];
	snprintf(to.sun_path, sizeof(to.sun_path), "%s", path);
	call_close(c);
	c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (connect(c->fd, (struct sockaddr *)&to, sizeof(to))) {
		fail("no tailscaled at %s: %s: is it running? TS_SOCKET names another socket", path,
		     strerror(errno));
		return ABSENT;
	}
	buf_printf(&text, "%s /localapi/v0/%s HTTP/1.1\r\nHost: local-tailscaled.sock\r\n"
		   "Content-Length: %zu\r\n\r\n%s", method, target, strlen(body), body);
	if (send(c->fd, text.at, text.len, MSG_NOSIGNAL) != (ssize_t)text.len)
		r = fail("tailscaled does not take a request: %s", strerror(errno));
	buf_free(&text);
	return r;
}

/* A piece of an answer's body. */
static int call_body(struct call *c, const char *at, size_t n,
		     void (*on_object)(void *arg, const struct split *s), void *arg)
{
	size_t room = MAX_WORDS - c->words.len;
	enum split_got got;

	if (c->http.status != 200) {
		buf_add(&c->words, at, n < room ? n : room);
		return 0;
	}
	while ((got = split_feed(&c->split, &at, &n)) != SPLIT_MORE) {
		if (got == SPLIT_BAD)
			return fail("the answer is no JSON: %s", why);
		if (on_object)
			on_object(arg, &c->split);
	}
	return 0;
}

/* Reads what there is; `on_object`, if any, gets each object. 1: that was the whole answer,
 * 0: more is to come, -1 with why. */
static int call_read(struct call *c, void (*on_object)(void *arg, const struct split *s), void *arg)
{
	const char *at, *body = NULL;
	size_t left, body_n = 0;
	enum http_got got;
	char bytes[4096];

	for (int i = 0; i < 64; i++) { /* then others have their turn */
		ssize_t n = recv(c->fd, bytes, sizeof(bytes), 0);

		if (n < 0)
			return errno == EAGAIN ? 0 : fail("tailscaled: %s", strerror(errno));
		at = bytes;
		left = n;
		do {
			got = n ? http_feed(&c->http, &at, &left, &body, &body_n) :
				  http_eof(&c->http);
			if (got == HTTP_BODY && call_body(c, body, body_n, on_object, arg))
				got = HTTP_BAD;
		} while (got == HTTP_HEAD || got == HTTP_BODY);
		if (got == HTTP_BAD)
			return fail("tailscaled: %s", why);
		if (got == HTTP_END && c->http.status == 200)
			return 1;
		if (got == HTTP_END)
			return fail("tailscaled says no: %d: %s", c->http.status,
				    c->words.at ? strtok(c->words.at, "\n") : "");
	}
	return 0;
}

static void object_copy(void *text, const struct split *s)
{
	buf_add(text, s->text, s->len);
}

/* A whole request, waiting for the answer. What there is of an object in it is in `j` until
 * the process ends. As call_open. */
static int call_wait(const char *method, const char *target, const char *body, struct json *j)
{
	struct call c = { 0 };
	struct buf text = { 0 };
	int r = call_open(&c, method, target, body);

	while (!r) {
		struct pollfd p = { .fd = c.fd, .events = POLLIN };

		r = poll(&p, 1, WAIT_LOCAL) == 1 ? call_read(&c, object_copy, &text) :
						   fail("tailscaled does not answer");
	}
	call_close(&c);
	buf_add(&text, "", 0);
	if (r > 0)
		json_parse(j, text.at, text.len); /* of a long one the beginning will do */
	return r < 0 ? r : 0;
}

/* --- routes ------------------------------------------------------------------- */

/* The name of a route's file; `text` begins with a quote. */
static const char *route_word(const char *text)
{
	static char name[64];

	snprintf(name, sizeof(name), "route_%.*s", (int)strcspn(text + 1, "\""), text + 1);
	for (char *c = name; *c; c++)
		*c = *c == '.' ? '-' : *c == '/' ? '_' : *c;
	return name;
}

/* Ranges as routes. */
static struct buf routes_of(struct buf ranges)
{
	char text[INET6_ADDRSTRLEN + 4];
	struct buf out = { 0 };

	for (struct cidr *c = (void *)ranges.at; ranges.len; c++, ranges.len -= sizeof(*c)) {
		struct cidr masked = *c;
		struct advert r = { 0 };

		addr_mask(&masked.addr, masked.bits);
		snprintf(r.text, sizeof(r.text), "\"%s\"", cidr_text(&masked, text));
		buf_add(&out, &r, sizeof(r));
	}
	free(ranges.at);
	return out;
}

static void routes_free(struct routes *r)
{
	buf_free(&r->edit);
	buf_free(&r->added);
	buf_free(&r->gone);
	*r = (struct routes){ 0 };
}

/* What the preferences lack, and, if `sure`, have of us without need. */
static struct routes routes_edit(const struct json *j, int prefs, const struct buf *want, bool sure)
{
	int list = json_get(j, prefs, "AdvertiseRoutes");
	struct routes r = { .null = list < 0 };
	bool null = false;

	buf_printf(&r.edit, EDIT_ROUTES "[");
	for (int i = json_first(j, list); i >= 0; i = json_next(j, list, i)) {
		const char *text = j->text + j->tok[i].start - 1;
		int n = j->tok[i].end - j->tok[i].start + 2; /* with the quotes */
		bool ours = !access(pin_path(route_word(text), 0), F_OK);
		struct advert gone = { 0 };

		r.ours |= ours;
		if (ours && sure && !(want->len && memmem(want->at, want->len, text, n))) {
			snprintf(gone.text, sizeof(gone.text), "%.*s", n, text);
			buf_add(&r.gone, &gone, sizeof(gone));
		} else {
			buf_printf(&r.edit, "%.*s,", n, text);
		}
	}
	ROUTES_EACH (w, want)
		if (!strstr(r.edit.at, w->text)) {
			buf_printf(&r.edit, "%s,", w->text);
			buf_add(&r.added, w, sizeof(*w));
		}
	if (r.edit.at[r.edit.len - 1] == ',')
		r.edit.len--;
	else
		null = !access(pin_path("routes_null", 0), F_OK);
	r.edit.len -= null; /* the bracket */
	buf_printf(&r.edit, null ? "null}" : "]}");
	if (!r.added.len && !r.gone.len)
		buf_free(&r.edit);
	return r;
}

/* Before they are written. 0, or -1 with why. */
static int routes_record(const struct routes *r)
{
	ROUTES_EACH (a, &r->added)
		if (pin(maps.fd[STAT_MAP], route_word(a->text), 0))
			return -1;
	if (r->added.len && r->null)
		return pin(maps.fd[STAT_MAP], "routes_null", 0);
	if (r->added.len && !r->ours)
		unpin("routes_null", 0);
	return 0;
}

/* They are written (`done`), or were refused: forgets what is ours no more, or never was. */
static void routes_settle(struct routes *r, bool done)
{
	ROUTES_EACH (old, done ? &r->gone : &r->added)
		unpin(route_word(old->text), 0);
	if (done)
		note("tailscaled was told: %s", r->edit.at);
	routes_free(r);
}

/* At once, and waiting for it. 0, or ABSENT or -1 with why. */
static int routes_now(const struct buf *want, bool sure)
{
	struct json j = { 0 };
	struct routes r;
	int failed = call_wait("GET", "prefs", "", &j);

	if (failed)
		return failed;
	r = routes_edit(&j, 0, want, sure);
	if (!r.edit.len)
		return 0;
	failed = routes_record(&r);
	if (!failed)
		failed = call_wait("PATCH", "prefs", r.edit.at, &j);
	routes_settle(&r, !failed);
	return failed;
}

/* --- what the loop calls -------------------------------------------------------- */

/* `why` is what happened: all begins anew after a pause. */
static void tailscaled_fail(struct tailscaled *t)
{
	uint64_t h = hash64(0, why, strlen(why));

	if (h != t->said)
		warn("--advertise: %s; trying again", why);
	t->said = h;
	call_close(&t->bus);
	call_close(&t->edit);
	t->deadline = now_ms() + pause_after(t->failures++);
}

/* Epoll will tell. */
static void tailscaled_ask(struct tailscaled *t, struct call *c, const char *method,
			   const char *target, const char *body)
{
	struct epoll_event e = { .events = EPOLLIN, .data.u32 = t->tag + (c == &t->edit) };

	t->deadline = now_ms() + WAIT_LOCAL;
	if (call_open(c, method, target, body) || epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, c->fd, &e))
		tailscaled_fail(t);
}

/* One repair at a time, and not more often than REPAIR_LEAST. */
static void tailscaled_repair(struct tailscaled *t)
{
	int64_t now = now_ms();

	if (t->edit.fd)
		return;
	t->deadline = t->todo.edit.len ? t->edited + REPAIR_LEAST : INT64_MAX;
	if (now < t->deadline)
		return;
	t->edited = now;
	routes_free(&t->doing);
	t->doing = t->todo;
	t->todo = (struct routes){ 0 };
	if (routes_record(&t->doing))
		return tailscaled_fail(t);
	tailscaled_ask(t, &t->edit, "PATCH", "prefs", t->doing.edit.at);
}

/* News from the bus: preferences are all that we look for. */
static void on_notify(void *arg, const struct split *s)
{
	static const char word[] = "\"Prefs\":{";
	struct tailscaled *t = arg;
	int prefs;

	if (!memmem(s->text, s->len, word, strlen(word))) /* a net map may be huge */
		return;
	json_take(&t->json, s);
	prefs = json_get(&t->json, 0, "Prefs");
	if (prefs < 0)
		return;
	routes_free(&t->todo);
	t->todo = routes_edit(&t->json, prefs, &t->want, t->sure);
	t->seen = true;
}

/* The descriptor of the bus (0) or of a repair (1) is ready. */
static void tailscaled_ready(struct tailscaled *t, unsigned which)
{
	struct call *c = which ? &t->edit : &t->bus;
	int r, status;

	if (!c->fd) /* closed in this round */
		return;
	r = call_read(c, which ? NULL : on_notify, t);
	status = c->http.status;
	if (which && r && status) {
		call_close(c);
		routes_settle(&t->doing, status == 200);
	}
	if (r < 0 || (!which && r && fail("tailscaled ended its bus")))
		return tailscaled_fail(t);
	if (!t->seen)
		return;
	if (!t->edit.fd && !t->todo.edit.len)
		t->failures = t->said = 0;
	tailscaled_repair(t);
}

/* From now on these ranges (of which the buffer is taken) are to be advertised; `sure`: these
 * alone. Epoll events with data.u32 = tag and tag + 1 belong to tailscaled_ready, and
 * t->deadline is to be kept. */
static void tailscaled_want(struct tailscaled *t, struct buf ranges, bool sure)
{
	buf_free(&t->want);
	t->want = routes_of(ranges);
	t->sure = sure;
	if (!t->want.len)
		warn("--advertise: no range is known: the API server shows no ServiceCIDRs (before "
		     "Kubernetes 1.33, or for want of a right); --map RANGE=RANGE names one");
	call_close(&t->bus); /* anew: it begins with the preferences */
	call_close(&t->edit);
	t->deadline = now_ms();
}

static void tailscaled_tick(struct tailscaled *t, int64_t now)
{
	if (now < t->deadline)
		return;
	if (t->edit.fd || (t->bus.fd && !t->seen)) {
		fail("tailscaled does not answer");
		tailscaled_fail(t);
	} else if (t->bus.fd) {
		tailscaled_repair(t);
	} else {
		t->seen = false;
		tailscaled_ask(t, &t->bus, "GET", WATCH_PREFS, "");
	}
}

/* === web (answers GET) ====================================================
 * A listening socket and the few who ask there; knows nothing of what it answers: `page` does.
 * A connection is one request, one answer and the end. Whoever connects may be silent, slow or
 * hostile: the oldest goes if there is no room for the next, nobody stays longer than
 * WEB_PATIENCE, nobody says more than WEB_REQUEST. */
#define WEB_CLIENTS  8
#define WEB_REQUEST  4096  /* bytes of a request's line and headers; Prometheus sends 300 */
#define WEB_PATIENCE 10000 /* ms from accept() to the last byte; Prometheus waits as long */
#define WEB_REST     1000  /* ms to the next accept() after one that found no descriptor free */

struct web_client {
	int fd;
	uint64_t number; /* in the order of their coming; 0: nobody */
	int64_t deadline;
	bool answered; /* all is sent; to close before it does could reset what it still reads */
	size_t n;
	char in[WEB_REQUEST + 1]; /* n bytes and a NUL */
};

/* Writes what there is at `path`; an HTTP status. */
typedef int page_fn(void *arg, const char *path, struct buf *out);

struct web { /* all zero: closed */
	int fd, epoll_fd;
	uint32_t tag;
	page_fn *page;
	void *arg;
	int64_t rest; /* when accept() is tried again; 0: it does not rest */
	uint64_t n_clients;
	struct web_client client[WEB_CLIENTS];
};

static int web_arm(const struct web *w, int op, int fd, uint32_t which, uint32_t events)
{
	return epoll_ctl(w->epoll_fd, op, fd,
			 &(struct epoll_event){ .events = events, .data.u32 = w->tag + which });
}

/* With epoll_fd, tag, page and arg set. From now on epoll events with data.u32 from tag to
 * tag + WEB_CLIENTS belong to web_ready, and web_deadline is to be kept. `::` is any address,
 * of IPv4 too. 0, or -1 with why. */
static int web_open(struct web *w, const struct in6_addr *addr, uint16_t port)
{
	int family = addr_is_v4(addr) ? AF_INET : AF_INET6;
	int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
	struct buf where = { 0 };
	struct sockaddr_storage at;
	socklen_t n;

	w->fd = socket(family, type, 0);
	if (w->fd < 0 && IN6_IS_ADDR_UNSPECIFIED(addr)) /* a kernel without IPv6 */
		w->fd = socket(family = AF_INET, type, 0);
	n = addr_socket(&at, family, addr, port);
	setsockopt(w->fd, IPPROTO_IPV6, IPV6_V6ONLY, &(int){ 0 }, sizeof(int));
	setsockopt(w->fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
	if (w->fd >= 0 && !bind(w->fd, (struct sockaddr *)&at, n) &&
	    !listen(w->fd, 2 * WEB_CLIENTS) && !web_arm(w, EPOLL_CTL_ADD, w->fd, 0, EPOLLIN))
		return 0;
	print_socket(&where, "cannot listen on ", addr, port);
	fail("--metrics: %s: %s; name another address or port", where.at, strerror(errno));
	buf_free(&where);
	close(w->fd);
	return -1;
}

static void client_close(struct web_client *c)
{
	if (!c->number)
		return;
	shutdown(c->fd, SHUT_RDWR); /* a child that looks a name up may hold it too */
	close(c->fd);
	c->number = 0;
}

/* The next in the queue; NULL: there is none. */
static struct web_client *client_accept(struct web *w, int64_t now)
{
	int fd = accept4(w->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct web_client *c = w->client;

	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
			w->rest = now + WEB_REST;
		if (w->rest)
			web_arm(w, EPOLL_CTL_MOD, w->fd, 0, 0);
		return NULL;
	}
	for (struct web_client *o = c; o < w->client + WEB_CLIENTS; o++)
		if (o->number < c->number)
			c = o;
	client_close(c);
	c->fd = fd;
	c->number = ++w->n_clients;
	c->deadline = now + WEB_PATIENCE;
	c->answered = false;
	c->n = 0;
	web_arm(w, EPOLL_CTL_ADD, fd, 1 + (c - w->client), EPOLLIN);
	return c;
}

/* Takes a request apart, in place: 200 with the path asked for, or the status of what is
 * wrong with it. Of the headers nothing is of interest. */
static int request_read(char *in, const char **path)
{
	char *end = strchr(in, '\n'), *target, *version;

	if (!end)
		return 400;
	end[-(end > in && end[-1] == '\r')] = 0;
	target = strchr(in, ' ');
	version = target ? strchr(target + 1, ' ') : NULL;
	if (!version || target == in || target[1] != '/' || strncmp(version, " HTTP/1.", 8) ||
	    !isdigit((unsigned char)version[8]) || version[9])
		return 400;
	*target++ = *version = 0;
	target[strcspn(target, "?")] = 0;
	*path = target;
	return strcmp(in, "GET") && strcmp(in, "HEAD") ? 405 : 200;
}

/* Says all at once: the socket's buffer is empty, and holds more than any page has. */
static void client_answer(const struct web *w, struct web_client *c, bool whole)
{
	struct buf head = { 0 }, body = { 0 };
	const char *path, *word = "OK";
	int status = whole ? request_read(c->in, &path) : 400;

	if (status == 200 && (status = w->page(w->arg, path, &body)) != 200)
		word = status == 404 ? "Not Found" : "Service Unavailable";
	else if (status == 400)
		buf_printf(&body, "%s: this is no HTTP request\n", word = "Bad Request");
	else if (status == 405)
		buf_printf(&body, "%s: only GET and HEAD\n", word = "Method Not Allowed");
	buf_printf(&head,
		   "HTTP/1.1 %d %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
		   "Content-Length: %zu\r\n%sConnection: close\r\n\r\n",
		   status, word, body.len, status == 405 ? "Allow: GET, HEAD\r\n" : "");
	if (strcmp(c->in, "HEAD"))
		buf_add(&head, body.at, body.len);
	if (send(c->fd, head.at, head.len, 0) != (ssize_t)head.len)
		client_close(c);
	else
		shutdown(c->fd, SHUT_WR);
	c->answered = true;
	c->n = 0;
	buf_free(&head);
	buf_free(&body);
}

/* Bytes of a request, or the end of what the client says, which makes the request whole. */
static void client_read(const struct web *w, struct web_client *c)
{
	ssize_t n = recv(c->fd, c->in + c->n, WEB_REQUEST - c->n, 0);
	bool broken, whole;

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n < 0 || (!n && (!c->n || c->answered)))
		return client_close(c);
	if (c->answered)
		return;
	c->n += n;
	c->in[c->n] = 0;
	broken = strlen(c->in) < c->n || c->n == WEB_REQUEST || !isupper((unsigned char)*c->in);
	whole = strstr(c->in, "\n\r\n") || strstr(c->in, "\n\n") || (!n && !broken);
	if (whole || broken)
		client_answer(w, c, whole);
}

/* The listening socket (0) or a client is ready. */
static void web_ready(struct web *w, uint32_t which, int64_t now)
{
	struct web_client *c = which ? &w->client[which - 1] : client_accept(w, now);

	if (c && c->number) /* it may have been sent away in this very round */
		client_read(w, c);
}

/* When web_tick is to be called. */
static int64_t web_deadline(const struct web *w)
{
	int64_t first = w->rest ? w->rest : INT64_MAX;

	for (const struct web_client *c = w->client; c < w->client + WEB_CLIENTS; c++)
		if (c->number && c->deadline < first)
			first = c->deadline;
	return first;
}

static void web_tick(struct web *w, int64_t now)
{
	for (struct web_client *c = w->client; c < w->client + WEB_CLIENTS; c++)
		if (c->deadline <= now)
			client_close(c);
	if (w->rest && w->rest <= now) {
		w->rest = 0;
		web_arm(w, EPOLL_CTL_MOD, w->fd, 0, EPOLLIN);
	}
}

/* === the loop =============================================================
 * One process, one epoll, one clock reading a round. Events change the model;
 * when all that was ready has been read, what is dirty goes to the maps. Nothing
 * here exits but by SIGTERM: what fails is said, and tried again when something
 * changes or a deadline comes. */
#define MAX_IFACES 8 /* of --iface */
#define MAX_FAR	   192 /* towards pods, each perhaps by a link of its own */
#define LEAVE_LAST   200000 /* us in which replies under way come back; see doors_leave */
#define LISTEN_AGAIN 5000 /* ms until --metrics tries again a port that others have */

enum wake_tag {
	WAKE_SIGNAL,
	WAKE_NETLINK,
	WAKE_TAILSCALED,
	WAKE_WEB = WAKE_TAILSCALED + 2,
	WAKE_API = WAKE_WEB + 1 + WEB_CLIENTS,
};

static struct agent {
	struct model model;
	struct api api;
	struct web web; /* --metrics */
	struct tailscaled tailscaled;
	struct doorway door[MAX_IFACES + MAX_FAR]; /* those of --iface come first */
	int n_iface, n_doors;
	bool look; /* something of interfaces or routes has changed */
	int64_t look_at; /* when to try again what failed; INT64_MAX: nothing did */
	unsigned failures; /* in a row */
	int64_t metrics_at; /* when to try again to listen; INT64_MAX: we do, or need not */
	int epoll_fd, signal_fd, netlink_fd;
	int pin_fd;   /* its lock is ours as long as it is open */
	bool attach;  /* the maps hold a state worth attaching to */
	bool stop;    /* SIGTERM, SIGINT */
	bool refused; /* the first state must not be programmed: why */
	struct tl_agent status;
} agent;

static void status_write(struct agent *a)
{
	const char *zone = a->model.places.zone;
	uint32_t zero = 0;

	snprintf(a->status.node, sizeof(a->status.node), "%s", opt.node);
	snprintf(a->status.zone, sizeof(a->status.zone), "%s", zone ? zone : "");
	bpf_map_update_elem(maps.fd[AGENT_MAP], &zero, &a->status, BPF_ANY);
}

/* --- interfaces ------------------------------------------------------------- */
static struct doorway *door_find(struct agent *a, int ifindex)
{
	for (struct doorway *d = a->door; d < a->door + a->n_doors; d++)
		if (d->ifindex == ifindex)
			return d;
	return NULL;
}

static struct doorway *far_add(struct agent *a, int ifindex)
{
	struct doorway *d = door_find(a, ifindex);
	static bool said;

	if (d)
		return d;
	if (a->n_doors == a->n_iface + MAX_FAR) {
		if (!said)
			warn("more than %d interfaces towards pods: source NAT is missing towards some", MAX_FAR);
		said = true;
		return NULL;
	}
	d = &a->door[a->n_doors++];
	*d = (struct doorway){ .ifindex = ifindex, .pods = true };
	link_look(d);
	return d;
}

static void door_lost(struct doorway *d)
{
	if (d->attached && !d->pods)
		note("%s is gone; waiting for it to come back", d->name);
	doors_detach(d->ifindex);
	d->attached = false;
	d->ifindex = 0;
}

/* News of any interface, or of routes: what they mean is looked up. */
static void on_news(void *arg, const struct nlmsghdr *h)
{
	const struct ifinfomsg *i = NLMSG_DATA(h);
	struct doorway *d = NULL;

	if (h->nlmsg_type == RTM_DELLINK && i->ifi_family == AF_UNSPEC)
		d = door_find(arg, i->ifi_index);
	if (d)
		door_lost(d);
}

/* Doors of an earlier run: those towards pods stay until there are routes to look at,
 * others go where they are not asked for. */
static void doors_adopt(struct agent *a)
{
	size_t n;
	uint64_t *left = doors_list(&n);

	for (size_t i = 0; i < n && !a->refused; i++) {
		struct doorway there = { .ifindex = left[i] }, *d = NULL;
		struct tl_door door = { 0 };
		uint32_t ifindex = left[i];

		if (bpf_map_lookup_elem(maps.fd[DOOR_MAP], &ifindex, &door) && errno != ENOENT) {
			a->refused = fail("door_map: %s", strerror(errno));
			continue;
		}
		if (link_look(&there) && opt.snat && is_far(&door))
			d = far_add(a, ifindex);
		if (d && d->pods)
			memcpy(d->snat, door.snat, sizeof(d->snat));
		else if (!door_find(a, ifindex))
			doors_detach(ifindex);
	}
	free(left);
}

/* By which interfaces, and from which addresses, are the backends reached that want source
 * NAT? The VPN's is none: who masquerades there has done it already. Brings the list of doors
 * to it. False: the kernel could not tell; nothing has changed. */
static bool far_look(struct agent *a)
{
	struct doorway old[MAX_FAR], *d;
	int fd = netlink_open(0), n_old = a->n_doors - a->n_iface;
	bool known = fd >= 0;
	struct route r;

	memcpy(old, a->door + a->n_iface, n_old * sizeof(*old));
	a->n_doors = a->n_iface;
	TABLE_EACH (&maps.places, l) {
		const struct in6_addr *addr = &((struct place *)l)->addr;

		if (!known)
			break;
		route_find(fd, addr, &r);
		known = !r.unknown;
		d = r.ifindex ? far_add(a, r.ifindex) : NULL;
		if (d && d->pods)
			d->snat[!addr_is_v4(addr)] = r.src;
	}
	close(fd);
	if (!known) {
		memcpy(a->door + a->n_iface, old, n_old * sizeof(*old));
		a->n_doors = a->n_iface + n_old;
		return false;
	}
	for (int i = 0; i < n_old; i++) {
		d = door_find(a, old[i].ifindex);
		if (!d && old[i].ifindex)
			doors_detach(old[i].ifindex);
		if (!d || !d->pods)
			continue;
		d->attached = old[i].attached && !memcmp(d->snat, old[i].snat, sizeof(d->snat));
		d->said = old[i].said;
	}
	return true;
}

/* What there is of one of --iface. */
static void iface_look(struct doorway *d)
{
	struct doorway was = *d;

	link_look(d);
	if (was.ifindex && was.ifindex != d->ifindex) /* gone, renamed, or another by that name */
		door_lost(&was);
	d->attached = was.attached && d->ifindex;
	if (d->attached && d->mtu != was.mtu)
		d->attached = !door_note(d);
}

static int n_attached(const struct agent *a)
{
	int n = 0;

	for (const struct doorway *d = a->door; d < a->door + a->n_iface; d++)
		n += d->attached;
	return n;
}

/* Brings the doors to what there is. What fails is tried again. */
static void doors_look(struct agent *a)
{
	bool known;
	int n;

	a->look = maps.places_changed = false;
	for (struct doorway *d = a->door; d < a->door + a->n_iface; d++)
		iface_look(d);
	n = n_attached(a);
	known = !opt.snat || !maps.adopted || far_look(a);
	a->failures = doors_attach(a->door, a->n_doors) || !known ? a->failures + 1 : 0;
	a->look_at = a->failures ? now_ms() + pause_after(a->failures - 1) : INT64_MAX;
	if (n_attached(a) > n && !a->tailscaled.bus.fd && a->tailscaled.deadline != INT64_MAX)
		a->tailscaled.deadline = 0; /* it has come back */
}

static void doors_tick(struct agent *a, int64_t now)
{
	if (a->attach && (a->look || maps.places_changed || now >= a->look_at))
		doors_look(a);
}

/* The maps hold a state worth attaching to. */
static void doors_begin(struct agent *a)
{
	if (a->attach)
		return;
	a->attach = true;
	for (struct doorway *d = a->door; d < a->door + a->n_iface; d++)
		link_look(d);
	doors_adopt(a);
	if (!a->refused)
		doors_look(a);
}

/* --- sync -------------------------------------------------------------------- */
/* ServiceCIDRs hold nothing up once they have failed. */
static bool all_synced(const struct agent *a)
{
	const bool *synced = a->model.synced;

	return synced[SERVICES] && synced[SLICES] && synced[NODES] &&
		(synced[SERVICE_CIDRS] || a->api.troubled & 1 << SERVICE_CIDRS);
}

/* After each round of events. The first time: may it be programmed at all? */
static void sync_now(struct agent *a)
{
	bool first = !maps.adopted, ranges = a->model.ranges_changed;

	if (a->refused || !all_synced(a))
		return;
	a->refused = first && model_check(&a->model);
	if (a->refused || (!maps_sync(&maps, &a->model) && !first))
		return;
	a->status.synced = true;
	a->status.changed = time(NULL);
	if (first)
		note("%zu services and %zu slices from %s", a->model.n_of[SERVICES], a->model.n_of[SLICES],
		     a->status.source);
	if (opt.advertise && ranges) /* a server that refuses them now may show them later */
		tailscaled_want(&a->tailscaled, model_ranges_of(&a->model, true),
				!a->api.watch[SERVICE_CIDRS].failures);
	a->look |= first;
	if (!first || !maps.services_late || maps.again_at == INT64_MAX)
		doors_begin(a); /* else not yet: the old programs have what these maps lack */
	status_write(a); /* last: who waits for this word finds doors at what is there */
}

/* --- metrics ----------------------------------------------------------------
 * Prometheus text. What the datapath counted is read when somebody asks; flows are counted
 * by flows_sweep, for to walk ct_map takes time and, for moments, locks of the datapath's. */
static void metric(struct buf *out, const char *name, const char *type, const char *help)
{
	buf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void metric_gauge(struct buf *out, const char *name, const char *help, uint64_t value)
{
	metric(out, name, "gauge", help);
	buf_printf(out, "%s %" PRIu64 "\n", name, value);
}

static void metrics_agent(struct buf *out, const struct agent *a)
{
	struct bpf_map_info ct = { 0 };
	uint32_t len = sizeof(ct);

	metric(out, "tail_lifter_build_info", "gauge", "Always 1; its label tells the version.");
	buf_printf(out, "tail_lifter_build_info{version=\"%s\"} 1\n", TAIL_LIFTER_VERSION);
	metric_gauge(out, "tail_lifter_synced",
		     "Whether all lists were complete once since the agent began.",
		     a->status.synced);
	metric_gauge(out, "tail_lifter_last_change_timestamp_seconds",
		     "When the agent last wrote to the datapath's maps; 0: not yet.",
		     a->status.changed);
	metric_gauge(out, "tail_lifter_services", "Services that the agent knows.",
		     a->model.n_of[SERVICES]);
	metric_gauge(out, "tail_lifter_slices", "EndpointSlices that the agent knows.",
		     a->model.n_of[SLICES]);
	metric(out, "tail_lifter_interface_attached", "gauge",
	       "Whether the datapath is attached to this VPN interface.");
	for (const struct doorway *d = a->door; d < a->door + a->n_iface; d++) {
		buf_printf(out, "tail_lifter_interface_attached{interface=");
		print_string(out, d->name);
		buf_printf(out, "} %d\n", d->attached);
	}
	bpf_map_get_info_by_fd(maps.fd[CT_MAP], &ct, &len);
	metric_gauge(out, "tail_lifter_ct_capacity",
		     "Entries for which ct_map has room; a flow takes two.", ct.max_entries);
	metric_gauge(out, "tail_lifter_flows", "Flows in ct_map, counted once a minute at most.",
		     maps.flows);
}

static void metrics_counters(struct buf *out, const char *name, const char *label, uint64_t which)
{
	for (int i = 0; i < TL_N_REASONS; i++)
		if (which >> i & 1)
			buf_printf(out, "%s{%s=\"%s\"} %" PRIu64 "\n", name, label, reasons[i].key,
				   counter_read(&maps, i));
}

static void metrics_process(struct buf *out)
{
	FILE *f = fopen("/proc/self/statm", "re");
	struct timespec cpu;
	uint64_t pages;

	if (f && fscanf(f, "%*u %" SCNu64, &pages) == 1)
		metric_gauge(out, "process_resident_memory_bytes", "Resident memory size in bytes.",
			     pages * sysconf(_SC_PAGESIZE));
	if (f)
		fclose(f);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
	metric(out, "process_cpu_seconds_total", "counter",
	       "Total user and system CPU time spent in seconds.");
	buf_printf(out, "process_cpu_seconds_total %" PRId64 ".%06ld\n", (int64_t)cpu.tv_sec,
		   cpu.tv_nsec / 1000);
}

/* Ready: synced, and attached to those of our interfaces that are there. */
static int ready(const struct agent *a, struct buf *out)
{
	for (int k = 0; k < N_KINDS && !a->status.synced; k++)
		if (!a->model.synced[k]) {
			buf_printf(out, "not synced: the list of %s has not come yet from %s\n",
				   resources[k].word, a->status.source);
			return 503;
		}
	for (const struct doorway *d = a->door; d < a->door + a->n_iface; d++) {
		unsigned there = if_nametoindex(d->name);

		if (!there || (d->attached && there == (unsigned)d->ifindex))
			continue;
		buf_printf(out, "not attached to %s: the log says why\n", d->name);
		return 503;
	}
	buf_printf(out, "ready\n");
	return 200;
}

static int page(void *arg, const char *path, struct buf *out)
{
	const struct agent *a = arg;

	if (!strcmp(path, "/readyz"))
		return ready(a, out);
	if (!strcmp(path, "/healthz")) {
		buf_printf(out, "the loop turns\n");
		return 200;
	}
	if (strcmp(path, "/metrics")) {
		buf_printf(out, "there are /metrics, /healthz and /readyz\n");
		return 404;
	}
	metrics_agent(out, a);
	metric(out, "tail_lifter_packets_total", "counter",
	       "Packets at each interface we are attached to, by what became of them.");
	metrics_counters(out, "tail_lifter_packets_total", "reason", ~TL_EVENTS);
	metric(out, "tail_lifter_events_total", "counter",
	       "What happened beside; these packets are in tail_lifter_packets_total too.");
	metrics_counters(out, "tail_lifter_events_total", "event", TL_EVENTS);
	metrics_process(out);
	return 200;
}

/* SIGHUP: --from is read anew; a bad file changes nothing. */
static void from_again(struct agent *a)
{
	if (opt.from && !strcmp(opt.from, "-"))
		warn("stdin cannot be read again: SIGHUP does nothing");
	else if (opt.from && from_read(&a->model, opt.from))
		warn("%s; the last good state stays", why);
}

static void on_signal(struct agent *a)
{
	struct signalfd_siginfo info;

	while (read(a->signal_fd, &info, sizeof(info)) == sizeof(info))
		if (info.ssi_signo == SIGHUP)
			from_again(a);
		else
			a->stop = true;
}

static int loop_watch(struct agent *a, int fd, uint32_t tag)
{
	struct epoll_event e = { .events = EPOLLIN, .data.u32 = tag };

	return epoll_ctl(a->epoll_fd, EPOLL_CTL_ADD, fd, &e) ? fail("epoll: %s", strerror(errno)) :
							       0;
}

/* The epoll, and signals in it. 0, or -1 with why. */
static int loop_open(struct agent *a)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	a->tailscaled.deadline = a->look_at = a->metrics_at = INT64_MAX;
	a->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	a->signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	return loop_watch(a, a->signal_fd, WAKE_SIGNAL);
}

/* --metrics. A port that is in use is tried again: the datapath is worth more. */
static void metrics_open(struct agent *a)
{
	bool first = a->metrics_at == INT64_MAX;

	a->metrics_at = INT64_MAX;
	a->web = (struct web){ .epoll_fd = a->epoll_fd, .tag = WAKE_WEB, .page = page, .arg = a };
	if (!opt.metrics_port || !web_open(&a->web, &opt.metrics, opt.metrics_port))
		return;
	if (first)
		warn("%s; trying again", why);
	a->metrics_at = now_ms() + LISTEN_AGAIN;
}

/* Waits for something and lets it happen. */
static void loop_round(struct agent *a)
{
	int64_t due[] = { api_deadline(&a->api), maps_deadline(&maps), a->tailscaled.deadline,
			  web_deadline(&a->web), a->look_at, a->metrics_at };
	int64_t wait = INT64_MAX;
	struct epoll_event e[8];
	int n;

	for (size_t i = 0; i < ARRAY_SIZE(due); i++)
		wait = due[i] < wait ? due[i] : wait;
	wait -= now_ms();
	n = epoll_wait(a->epoll_fd, e, ARRAY_SIZE(e), wait >= INT_MAX ? -1 : wait > 0 ? wait : 0);
	for (int i = 0; i < n; i++)
		if (e[i].data.u32 == WAKE_SIGNAL) {
			on_signal(a);
		} else if (e[i].data.u32 == WAKE_NETLINK) {
			netlink_read(a->netlink_fd, on_news, a);
			a->look = true;
		} else if (e[i].data.u32 < WAKE_WEB) {
			tailscaled_ready(&a->tailscaled, e[i].data.u32 - WAKE_TAILSCALED);
		} else if (e[i].data.u32 < WAKE_API) {
			web_ready(&a->web, e[i].data.u32 - WAKE_WEB, now_ms());
		} else {
			api_ready(&a->api, &a->model, e[i].data.u32 - WAKE_API, e[i].events);
		}
	web_tick(&a->web, now_ms());
	if (now_ms() >= a->metrics_at)
		metrics_open(a);
	api_tick(&a->api, now_ms());
	tailscaled_tick(&a->tailscaled, now_ms());
	maps_tick(&maps, &a->model, now_ms());
}

/* Where the objects come from: a file is read at once, a server is asked from
 * now on. `once`: the first failure ends it. 0, or -1 with why. */
static int source_open(struct agent *a, bool once)
{
	if (!opt.from && api_open(&a->api))
		return -1;
	snprintf(a->status.source, sizeof(a->status.source), "%s",
		 opt.from ? opt.from : api_source(&a->api));
	if (opt.from) {
		for (int k = 0; k < N_KINDS; k++)
			a->api.watch[k].deadline = INT64_MAX;
		return from_read(&a->model, opt.from);
	}
	a->api.once = once;
	api_start(&a->api, a->epoll_fd, WAKE_API);
	return 0;
}

/* === commands =============================================================
 * Each returns 0, or -1 with why, or 1 if it has said itself what is wrong. */
static int print_out(const struct buf *out)
{
	fwrite(out->at, 1, out->len, stdout);
	return fflush(stdout) ? fail("cannot write: %s", strerror(errno)) : 0;
}

/* Everything up to the first event. 0, or -1 with why. */
static int agent_open(struct agent *a, bool once)
{
	struct ifreq none = { 0 };
	struct tl_svc_key any;

	a->pin_fd = pin_dir_open();
	if (a->pin_fd < 0)
		return -1;
	if (!pin_dir_lock(a->pin_fd))
		return fail("another tail_lifter (%s) is at work with %s; stop it first, or use "
			    "another --pin-dir",
			    agent_where(pin_dir_holder(a->pin_fd)), opt.pin_dir);
	if (link_ask(SIOCGIFINDEX, &none) && errno != ENODEV)
		return fail("cannot ask for interfaces: %s", strerror(errno));
	/* the source before the datapath: a first start without one leaves nothing behind */
	if (loop_open(a) || source_open(a, once) || datapath_load(&maps))
		return -1;
	if (!once)
		metrics_open(a);
	a->netlink_fd = netlink_open(RTMGRP_LINK | (opt.snat ? RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE |
						    RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR : 0));
	if (a->netlink_fd < 0 || loop_watch(a, a->netlink_fd, WAKE_NETLINK))
		return -1;
	a->status.pid = getpid();
	a->tailscaled.epoll_fd = a->epoll_fd;
	a->tailscaled.tag = WAKE_TAILSCALED;
	if (!PATIENT(bpf_map_get_next_key(maps.fd[SVC_MAP], NULL, &any))) /* of an earlier run */
		doors_begin(a);
	status_write(a);
	return 0;
}

/* --once: the interfaces there are have doors, or it is said why not; 0: all have. */
static int ifaces_attached(struct agent *a)
{
	if (a->failures) /* now or never */
		doors_look(a);
	doors_tick(a, now_ms());
	for (struct doorway *d = a->door; d < a->door + a->n_iface; d++)
		if (!d->ifindex)
			warn("there is no interface %s: is tailscaled running? "
			     "--iface names another",
			     d->name);
	return a->failures || n_attached(a) < a->n_iface;
}

/* If another bpffs came over ours, doors and maps go with us, and whoever came after us has its
 * own: first those go that begin flows, so that it begins them, while replies still come back. */
static void doors_leave(const struct agent *a)
{
	DECLARE_LIBBPF_OPTS(bpf_obj_get_opts, at, .file_flags = BPF_F_PATH_FD,
			    .path_fd = a->pin_fd);
	struct stat ours, there;
	char name[32];
	int link;

	if (fstat(a->pin_fd, &ours) ||
	    (stat(opt.pin_dir, &there) ? errno != ENOENT : there.st_dev == ours.st_dev))
		return;
	for (const struct doorway *d = a->door; d < a->door + a->n_doors; d++) {
		snprintf(name, sizeof(name), "%s_%d", d->pods ? "to" : "from", d->ifindex);
		link = bpf_obj_get_opts(name, &at);
		bpf_link_detach(link); /* at once: for want of a file it would go in a while */
		close(link);
	}
	usleep(LEAVE_LAST);
}

/* Attach, sync, and stay, unless `once`; the datapath stays when we go. */
static int agent_run(struct agent *a, bool once)
{
	int missing;

	if (agent_open(a, once))
		return rmdir(opt.pin_dir), -1; /* only if there is nothing in it */
	for (sync_now(a); !a->stop && !a->refused && !a->api.failed && !(once && maps.adopted && a->attach && !maps.dying.len);
	     sync_now(a)) {
		doors_tick(a, now_ms());
		flows_sweep(&maps, now_ms());
		loop_round(a);
	}
	if (a->api.failed)
		fail("%s", a->api.failed);
	else if (once && a->stop)
		fail("stopped before the first sync was complete");
	if (a->refused || (once && !maps.adopted))
		return -1;
	api_stop(&a->api);
	if (!once)
		return doors_leave(a), 0;
	missing = ifaces_attached(a) || maps.again_at != INT64_MAX;
	return opt.advertise && routes_now(&a->tailscaled.want, a->tailscaled.sure) ? -1 : missing;
}

static int cmd_run(void)
{
	return agent_run(&agent, false);
}

static int cmd_once(void)
{
	return agent_run(&agent, true);
}

/* --dry-run: what would be programmed. */
static int cmd_dry_run(void)
{
	struct agent *a = &agent;
	struct buf out = { 0 };

	if (loop_open(a) || source_open(a, true))
		return -1;
	while (!all_synced(a) && !a->api.failed && !a->stop)
		loop_round(a);
	if (!all_synced(a))
		fail("%s", a->api.failed ? a->api.failed : "stopped");
	if (!all_synced(a) || model_check(&a->model))
		return -1;
	model_settle(&a->model);
	print_dry_run(&out, &a->model, opt.json);
	return print_out(&out);
}

/* --- status: everything out of the pinned maps -------------------------------- */
/* A text out of its pieces. */
static struct buf text_find(const struct maps *m, uint64_t text)
{
	struct tl_text_key key = { .text = text };
	struct tl_text piece = { { 0 } };
	struct buf out = { 0 };

	do
		buf_add(&out, piece.at, strnlen(piece.at, TL_TEXT));
	while (!bpf_map_lookup_elem(m->fd[TEXT_MAP], &key, &piece) && (key.piece++, piece.at[0]));
	return out;
}

/* A frontend. `text` is its entry's: NAMESPACE, NAME, PORT, PROTOCOL, family, scope, with
 * NULs between them, so that bytes sort as CONTRACT sorts entries. */
struct found {
	struct buf text;
	struct tl_svc_key key;
	struct tl_svc svc;
};

static int found_order(const void *x, const void *y)
{
	const struct found *a = x, *b = y;
	int c = memcmp(a->text.at, b->text.at,
		       a->text.len < b->text.len ? a->text.len : b->text.len);

	return c ? c : memcmp(&a->key, &b->key, sizeof(a->key));
}

/* False: it is none, or not of the service `only`, which may be NULL. */
static bool found_read(const struct maps *m, const struct tl_svc_key *key, const char *only,
		       struct found *f)
{
	size_t n = only ? strlen(only) : 0;
	bool v4 = addr_is_v4((const struct in6_addr *)&key->addr);
	int slashes = 0;
	char *last;

	*f = (struct found){ .key = *key };
	if (!key->port || bpf_map_lookup_elem(m->fd[SVC_MAP], key, &f->svc))
		return false;
	f->text = text_find(m, f->svc.name);
	last = strrchr(f->text.at, '/');
	if (!last || (only && (strncmp(f->text.at, only, n) || f->text.at[n] != '/')))
		return false;
	f->text.len = last - f->text.at;
	buf_printf(&f->text, "/%s/%d/%u", proto_name(key->proto), v4 ? 4 : 6,
		   f->svc.flags & TL_SVC_SCOPE);
	for (char *c = f->text.at; (c = strchr(c, '/')); slashes++)
		*c++ = 0;
	return slashes == 5;
}

static void entry_add_backends(const struct maps *m, const struct tl_svc *svc, struct entry *e)
{
	struct tl_set_key key = { .set = svc->set };
	struct tl_chunk chunk;

	e->backends = mem(NULL, svc->n_backends * sizeof(*e->backends));
	for (uint32_t i = 0; i < svc->n_backends; i++) {
		const struct tl_backend *b = &chunk.at[i % TL_CHUNK];
		struct backend *to = &e->backends[i];

		key.chunk = i / TL_CHUNK;
		if (i % TL_CHUNK == 0 && bpf_map_lookup_elem(m->fd[SET_MAP], &key, &chunk))
			return;
		*to = (struct backend){ .port = ntohs(b->port),
					.local = b->flags & TL_BACKEND_LOCAL,
					.node = text_find(m, b->node).at };
		memcpy(&to->addr, &b->addr, sizeof(to->addr));
		e->n_backends = i + 1;
	}
}

static int range_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct cidr));
}

static void entry_add_sources(const struct maps *m, const struct tl_svc *svc, struct entry *e)
{
	uint32_t scope[2] = { svc->name, svc->name >> 32 };
	struct tl_net_key key, *before = NULL;
	struct buf out = { 0 };
	int most = TL_MAX_NETS; /* it may change meanwhile, and begin anew */

	for (; most-- && !bpf_map_get_next_key(m->fd[NET_MAP], before, &key); before = &key) {
		struct cidr c = { .bits = key.prefixlen - 64 };

		memcpy(&c.addr, &key.addr, sizeof(c.addr));
		if (!memcmp(key.scope, scope, sizeof(scope)) && addr_is_v4(&c.addr) == e->v4)
			buf_add(&out, &c, sizeof(c));
	}
	e->sources = (struct cidr *)out.at;
	e->n_sources = out.len / sizeof(struct cidr);
	if (e->n_sources)
		qsort(e->sources, e->n_sources, sizeof(struct cidr), range_order);
}

/* The entry of `n` frontends. */
static struct entry entry_read(const struct maps *m, const struct found *f, int n)
{
	struct entry e = {
		.ns = f->text.at,
		.proto = f->key.proto,
		.v4 = addr_is_v4((const struct in6_addr *)&f->key.addr),
		.scope = f->svc.flags & TL_SVC_SCOPE,
		.drop_if_empty = f->svc.flags & TL_SVC_DROP_IF_EMPTY,
		.affinity = f->svc.affinity,
		.frontends = mem(NULL, n * sizeof(*e.frontends)),
		.n_frontends = n,
	};

	e.name = e.ns + strlen(e.ns) + 1;
	e.port = e.name + strlen(e.name) + 1;
	for (int i = 0; i < n; i++) {
		memcpy(&e.frontends[i].addr, &f[i].key.addr, sizeof(e.frontends[i].addr));
		e.frontends[i].port = ntohs(f[i].key.port);
	}
	entry_add_backends(m, &f->svc, &e);
	if (f->svc.flags & TL_SVC_SOURCES)
		entry_add_sources(m, &f->svc, &e);
	return e;
}

static void key_add(void *keys, int fd, const void *key, const void *value)
{
	(void)fd;
	(void)value;
	buf_add(keys, key, sizeof(struct tl_svc_key));
}

/* All entries that the datapath has, sorted; only those of `only` (NAMESPACE/NAME)
 * unless that is NULL. Memory is left to the end of the process. */
static struct entry *status_entries(const struct maps *m, const char *only, int *n)
{
	struct buf keys = { 0 }, found = { 0 }, out = { 0 };
	struct tl_svc_key key;
	struct found f, *at, *end;

	map_walk(m->fd[SVC_MAP], key_add, &keys);
	for (size_t i = 0; i < keys.len; i += sizeof(key)) {
		memcpy(&key, keys.at + i, sizeof(key));
		if (found_read(m, &key, only, &f))
			buf_add(&found, &f, sizeof(f));
	}
	at = (struct found *)found.at;
	end = at + found.len / sizeof(f);
	if (at)
		qsort(at, end - at, sizeof(f), found_order);
	for (int run; at < end; at += run) {
		struct entry e;

		for (run = 1; at + run < end && at[run].text.len == at->text.len; run++)
			if (memcmp(at[run].text.at, at->text.at, at->text.len))
				break;
		e = entry_read(m, at, run);
		buf_add(&out, &e, sizeof(e));
	}
	*n = out.len / sizeof(struct entry);
	return (struct entry *)out.at;
}

/* What --status shows besides the services. */
struct overview {
	struct tl_agent agent;
	bool running;
	int pid; /* as we see it, which may not be as it sees itself (agent.pid) */
	uint64_t flows;
	uint32_t capacity;
	struct door {
		char name[IF_NAMESIZE];
		int ifindex;
		bool l2, pods; /* pods: towards them, for source NAT */
		const char *hook;
	} * doors;
	size_t n_doors;
	uint64_t counters[TL_N_REASONS];
	char changed[32];
	struct table fronts; /* whose flows they are */
};

/* A frontend of an entry. */
struct front {
	struct link link;
	struct frontend at;
	struct entry *of;
};

static uint64_t front_hash(const struct in6_addr *addr, uint16_t port, uint8_t proto)
{
	return hash64((uint64_t)port << 8 | proto, addr, sizeof(*addr));
}

static void flow_add(void *overview, int fd, const void *key, const void *value)
{
	const struct tl_tuple *t = key;
	const struct tl_flow *f = value;
	struct overview *o = overview;
	bool back = t->dir == TL_REPLY;
	const struct tl_addr *addr = back ? &f->to.src : &t->dst;
	uint16_t port = ntohs(back ? f->to.sport : t->dport);
	struct front *front = NULL;

	(void)fd;
	if (t->dir > TL_REPLY)
		return;
	o->flows += !back;
	while ((front = (struct front *)table_next(&o->fronts, (struct link *)front,
						   front_hash((struct in6_addr *)addr, port, t->proto))))
		if (!memcmp(&front->at.addr, addr, sizeof(*addr)) && front->at.port == port &&
		    front->of->proto == t->proto)
			break;
	if (!front)
		return;
	front->of->flows += !back;
	front->of->packets[back] += f->packets;
	front->of->bytes[back] += f->bytes;
}

/* Counts flows, altogether and for each of the entries. */
static void flows_read(const struct maps *m, struct overview *o, struct entry *e, int n)
{
	for (; n--; e++)
		for (int i = 0; i < e->n_frontends; i++) {
			struct front *front = mem(NULL, sizeof(*front));

			*front = (struct front){ .at = e->frontends[i], .of = e };
			table_add(&o->fronts, &front->link,
				  front_hash(&front->at.addr, front->at.port, e->proto));
		}
	map_walk(m->fd[CT_MAP], flow_add, o);
}

/* False: there is no such interface. */
static bool door_read(int ifindex, struct door *d)
{
	struct doorway l = { .ifindex = ifindex };
	struct bpf_link_info link;
	bool there = link_look(&l);
	int fd = pinned("to", ifindex);
	struct tl_door door = { 0 };

	bpf_map_lookup_elem(maps.fd[DOOR_MAP], &ifindex, &door);
	*d = (struct door){ .ifindex = ifindex,
			    .l2 = is_ethernet(l.type),
			    .pods = is_far(&door),
			    .hook = is_tcx_link(fd, &link) ? "tcx" : "clsact" };
	memcpy(d->name, l.name, sizeof(d->name));
	close(fd);
	return there;
}

static void overview_read(const struct maps *m, struct overview *o)
{
	struct bpf_map_info info = { 0 };
	uint32_t zero = 0, len = sizeof(info);
	int fd = pin_dir_fd();
	uint64_t *ifindex;
	time_t changed;
	size_t n;

	o->running = pin_dir_locked(fd);
	o->pid = o->running ? pin_dir_holder(fd) : 0;
	close(fd);
	bpf_map_lookup_elem(m->fd[AGENT_MAP], &zero, &o->agent);
	changed = o->agent.changed;
	if (changed)
		strftime(o->changed, sizeof(o->changed), "%Y-%m-%dT%H:%M:%SZ", gmtime(&changed));
	bpf_map_get_info_by_fd(m->fd[CT_MAP], &info, &len);
	o->capacity = info.max_entries;
	ifindex = doors_list(&n);
	o->doors = mem(NULL, n * sizeof(*o->doors));
	for (size_t i = 0; i < n; i++)
		o->n_doors += door_read(ifindex[i], &o->doors[o->n_doors]);
	for (uint32_t i = 0; i < TL_N_REASONS; i++)
		o->counters[i] = counter_read(m, i);
}

static void print_status_json(struct buf *out, const struct overview *o, const struct entry *e,
			      int n)
{
	buf_printf(out, "{\"node\":");
	print_string(out, o->agent.node);
	buf_printf(out, ",\"zone\":");
	print_string(out, o->agent.zone);
	buf_printf(out, ",\"services\":[");
	print_entries_json(out, e, n, true);
	buf_printf(out, "],\n\"agent\":{\"running\":%s,\"pid\":%u,\"source\":",
		   o->running ? "true" : "false", o->running ? o->agent.pid : 0);
	print_string(out, o->agent.source);
	buf_printf(out, ",\"synced\":%s,\"last_change\":\"%s\"},\n\"interfaces\":[",
		   o->agent.synced ? "true" : "false", o->changed);
	for (struct door *d = o->doors; d < o->doors + o->n_doors; d++)
		buf_printf(out,
			   "%s{\"name\":\"%s\",\"ifindex\":%d,\"link\":\"l%d\",\"hook\":\"%s\"%s}",
			   d > o->doors ? "," : "", d->name, d->ifindex, d->l2 ? 2 : 3, d->hook,
			   d->pods ? ",\"snat\":true" : "");
	buf_printf(out, "],\n\"flows\":{\"count\":%" PRIu64 ",\"capacity\":%u},\n\"counters\":{",
		   o->flows, o->capacity);
	for (int i = 0; i < TL_N_REASONS; i++)
		buf_printf(out, "%s\"%s\":%" PRIu64, i ? "," : "", reasons[i].key, o->counters[i]);
	buf_printf(out, "}}\n");
}

static void print_status_text(struct buf *out, const struct overview *o, const struct entry *e,
			      int n)
{
	buf_printf(out, "agent: %s%s",
		   o->running ? "running, " : "not running; the datapath works without it",
		   o->running ? agent_where(o->pid) : "");
	buf_printf(out, "\n  source: %s%s\n  last change: %s\n  node: %s%s%s\n", o->agent.source,
		   o->agent.synced ? "" : " (not synced yet)", o->changed, o->agent.node,
		   *o->agent.zone ? ", zone " : "", o->agent.zone);
	for (struct door *d = o->doors; d < o->doors + o->n_doors; d++)
		buf_printf(out, "\ninterface: %s%s\n  link: %s\n  hook: %s\n", d->name,
			   d->pods ? " (towards pods, for source NAT)" : "",
			   d->l2 ? "Ethernet" : "bare IP", d->hook);
	if (!o->n_doors)
		buf_printf(out, "\ninterface: (none attached)\n");
	print_entries_text(out, e, n);
	buf_printf(out, "\nflows: %" PRIu64 " of at most %u\n", o->flows, o->capacity / 2);
	for (int i = 0; i < TL_N_REASONS; i++)
		if (o->counters[i])
			buf_printf(out, "%12" PRIu64 "  %s\n", o->counters[i], reasons[i].text);
}

/* Another version may have made these maps; its values would not fit in ours. */
static bool map_is_known(int fd, enum map map)
{
	static const uint32_t sizes[N_MAPS][2] = {
		{ sizeof(struct tl_text_key), sizeof(struct tl_text) },
		{ sizeof(struct tl_net_key), sizeof(uint32_t) },
		{ sizeof(struct tl_set_key), sizeof(struct tl_chunk) },
		{ sizeof(struct tl_svc_key), sizeof(struct tl_svc) },
		{ sizeof(struct tl_tuple), sizeof(struct tl_flow) },
		{ sizeof(uint32_t), sizeof(uint64_t) },
		{ sizeof(uint32_t), sizeof(struct tl_agent) },
		{ sizeof(uint32_t), sizeof(struct tl_door) },
	};
	struct bpf_map_info info = { 0 };
	uint32_t len = sizeof(info);

	return !bpf_map_get_info_by_fd(fd, &info, &len) && info.key_size == sizes[map][0] &&
		info.value_size == sizes[map][1];
}

static int cmd_status(void)
{
	static struct overview o;
	struct buf out = { 0 };
	struct entry *e;
	int n;

	for (int i = 0; i < N_MAPS; i++) {
		maps.fd[i] = pinned(map_names[i], 0);
		if (maps.fd[i] < 0 && errno == ENOENT)
			return fail("nothing of TailLifter is in %s: it was never started here, "
				    "or was cleaned up",
				    opt.pin_dir);
		if (maps.fd[i] < 0)
			return fail("cannot read %s/%s: %s; run as root", opt.pin_dir, map_names[i],
				    strerror(errno));
		if (!map_is_known(maps.fd[i], i))
			return fail("%s/%s is of another version of TailLifter: ask that one, or start this one",
				    opt.pin_dir, map_names[i]);
	}
	overview_read(&maps, &o);
	e = status_entries(&maps, opt.status_of, &n);
	flows_read(&maps, &o, e, n);
	if (opt.status_of && !n)
		return fail("no service %s is served here", opt.status_of);
	if (opt.json)
		print_status_json(&out, &o, e, n);
	else
		print_status_text(&out, &o, e, n);
	return print_out(&out);
}

/* --- cleanup ------------------------------------------------------------------ */
/* Tells a running agent to stop, and waits until it has. 0, or -1 with why. */
static int stop_agent(int pin_fd)
{
	for (int tries = 0; pin_dir_locked(pin_fd); tries++, usleep(50000)) {
		int pid = pin_dir_holder(pin_fd);

		if (!tries && pid && kill(pid, SIGTERM) && errno != ESRCH)
			return fail("cannot stop the agent (pid %d): %s", pid, strerror(errno));
		if (tries == 100)
			return fail("the agent (%s) still runs after 5 s: stop it (kubectl delete "
				    "-f k3s/tail-lifter.yaml, systemctl stop tail-lifter), then "
				    "try again",
				    agent_where(pid));
	}
	return 0;
}

/* The bpffs goes too if it was us who mounted it, and nothing else is in it. */
static void unmount_ours(void)
{
	FILE *f = fopen("/proc/self/mounts", "re");
	char line[PATH_MAX];
	bool ours = false;

	while (f && fgets(line, sizeof(line), f))
		if (strstr(line, " " BPFFS " ")) /* the last one is the one on top */
			ours = !strncmp(line, MOUNT_NAME " ", strlen(MOUNT_NAME " "));
	if (f)
		fclose(f);
	if (ours && !dir_next(opendir(BPFFS)))
		umount(BPFFS);
}

/* tailscaled's routes as they would be without us. 0, or -1 with why: it can be tried again. */
static int routes_restore(void)
{
	struct buf ours = { 0 };
	const char *name;
	int r;

	for (DIR *dir = opendir(opt.pin_dir); (name = dir_next(dir));)
		if (!strncmp(name, "route_", 6))
			buf_printf(&ours, " %s", name + 6);
	if (!ours.len)
		return 0;
	r = routes_now(&(struct buf){ 0 }, true);
	for (char *c = ours.at; *c; c++)
		*c = *c == '-' ? '.' : *c == '_' ? '/' : *c;
	if (r == ABSENT)
		warn("%s; what we had it advertise stays:%s; tailscale set --advertise-routes= "
		     "with the others alone takes them away", why, ours.at);
	buf_free(&ours);
	return r == ABSENT ? 0 : r;
}

static void on_any_qdisc(void *list, const struct nlmsghdr *h)
{
	const struct tcmsg *t = NLMSG_DATA(h);

	if (h->nlmsg_type == RTM_NEWQDISC && t->tcm_parent == TC_H_CLSACT)
		buf_add(list, &t->tcm_ifindex, sizeof(t->tcm_ifindex));
}

/* The bpffs was lost, and with it what was attached by tcx, but not filters. */
static void filters_detach(void)
{
	struct buf list = { 0 };
	int fd = netlink_open(0), ifindex;

	netlink_ask(fd, RTM_GETQDISC, 0, 0);
	netlink_wait(fd, on_any_qdisc, &list);
	close(fd);
	for (size_t i = 0; i < list.len; i += sizeof(ifindex)) {
		memcpy(&ifindex, list.at + i, sizeof(ifindex));
		if (!clsact_look(ifindex).ours)
			continue;
		doors_detach_tc(ifindex, false);
		clsact_detach(ifindex);
	}
}

/* Leaves no trace. Nothing there is fine. */
static int cmd_cleanup(void)
{
	int pin_fd = pin_dir_fd();
	const char *name;
	uint64_t *ifindex;
	size_t n;
	DIR *dir;

	if (pin_fd < 0 && errno == ENOENT)
		return filters_detach(), unmount_ours(), 0;
	if (pin_fd < 0 || !is_bpffs(opt.pin_dir))
		return fail("cannot clean up %s: %s", opt.pin_dir,
			    pin_fd < 0 ? strerror(errno) : "it is in no bpffs");
	if (stop_agent(pin_fd))
		return -1;
	ifindex = doors_list(&n); /* doors first */
	while (n)
		doors_detach(ifindex[--n]);
	if (routes_restore())
		return -1;
	for (dir = opendir(opt.pin_dir); (name = dir_next(dir));)
		unpin(name, 0);
	close(pin_fd);
	if (rmdir(opt.pin_dir))
		return fail("cannot remove %s: %s; run as root", opt.pin_dir, strerror(errno));
	unmount_ours();
	return 0;
}

/* --- check: what would keep it from working here ------------------------------- */
enum verdict { GOOD, HINT, UNSEEN, MEND };

static const char *const verdict_words[] = { "ok", "hint", "?", "FIX" };

#define LOOK_WATCH 16 /* to watch a kind, not to list it */

/* Each function looks at one thing, tells in `why` what is there or what to do, and
 * changes nothing. `what` is from its row. */
static enum verdict check_privileges(int what)
{
	struct __user_cap_header_struct h = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct d[2] = { 0 };
	uint64_t have;
	bool bpf_too, net;

	(void)what;
	syscall(SYS_capget, &h, d);
	have = d[0].effective | (uint64_t)d[1].effective << 32;
	net = have >> CAP_NET_ADMIN & 1;
	bpf_too = have >> CAP_BPF & 1 || have >> CAP_SYS_ADMIN & 1;
	fail("%s%s%s",
	     net && bpf_too ? "CAP_NET_ADMIN and CAP_BPF are there" : "run as root, or with ",
	     net ? "" : "CAP_NET_ADMIN ",
	     bpf_too ? "" : "CAP_BPF (before Linux 5.8: CAP_SYS_ADMIN)");
	return net && bpf_too ? GOOD : MEND;
}

/* Loads the programs, and lets them go with this process. */
static enum verdict check_kernel(int what)
{
	struct utsname u;
	int prog;

	(void)what;
	if (datapath_open() || datapath_verify())
		return MEND;
	uname(&u);
	prog = bpf_program__fd(bpf->progs.to_tailnet);
	if (bpf_link_create(prog, INT_MAX, BPF_TCX_EGRESS, NULL) < 0 && errno == ENODEV)
		return fail("Linux %s takes the programs, and has tcx to attach them", u.release),
		       GOOD;
	fail("Linux %s takes the programs, and has no tcx: the modules sch_ingress and cls_bpf are "
	     "needed",
	     u.release);
	return HINT;
}

static enum verdict check_bpffs(int what)
{
	char parent[PATH_MAX];

	(void)what;
	pin_dir_parent(parent);
	if (is_bpffs(parent))
		return fail("%s is one", parent), GOOD;
	fail("%s is none: mount -t bpf bpf " BPFFS ", and --pin-dir a directory below it", parent);
	if (strcmp(parent, BPFFS))
		return MEND;
	fail("%s is not mounted yet; the agent does that if it is root, else: mount -t bpf bpf %s",
	     parent, parent);
	return geteuid() ? MEND : HINT;
}

static enum verdict check_iface(int what)
{
	int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	enum verdict v = GOOD;

	(void)what;
	fail("there, and up");
	for (struct doorway *i = agent.door; i < agent.door + agent.n_iface && v == GOOD; i++) {
		struct ifreq dev = { 0 };

		memcpy(dev.ifr_name, i->name, IF_NAMESIZE);
		v = MEND;
		if (ioctl(any, SIOCGIFFLAGS, &dev))
			fail("there is no %s: start tailscaled, or name another by --iface",
			     i->name);
		else if (!(dev.ifr_flags & IFF_UP))
			fail("%s is down: ip link set %s up", i->name, i->name);
		else
			v = GOOD;
	}
	close(any);
	return v;
}

/* A number below /proc/sys/net, its path in three pieces; -1: there is none. */
static int sysctl_read(const char *from, const char *through, const char *to)
{
	char path[128];
	int value = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/sys/net/%s%s%s", from, through, to);
	f = fopen(path, "re");
	if (f && fscanf(f, "%d", &value) != 1)
		value = -1;
	if (f)
		fclose(f);
	return value;
}

static enum verdict check_forwarding(int family)
{
	bool v4 = family == AF_INET;
	const char *name = v4 ? "ipv4.ip_forward" : "ipv6.conf.all.forwarding";
	int on = v4 ? sysctl_read("ipv4", "/", "ip_forward") :
		      sysctl_read("ipv6/conf/", "all", "/forwarding");

	if (on > 0)
		return fail("net.%s is %d", name, on), GOOD;
	if (on < 0)
		return fail("cannot be read: net.%s", name), UNSEEN;
	fail("net.%s is 0, nothing reaches a pod%s: sysctl -w net.%s=1", name,
	     v4 ? "" : " by IPv6, if the cluster has that", name);
	return v4 ? MEND : HINT;
}

static enum verdict check_rp_filter(int what)
{
	int all = sysctl_read("ipv4/conf/", "all", "/rp_filter");

	(void)what;
	for (struct doorway *i = agent.door; i < agent.door + agent.n_iface; i++) {
		int own = sysctl_read("ipv4/conf/", i->name, "/rp_filter");

		if (own < 0)
			return fail("cannot be looked at: there is no %s", i->name), UNSEEN;
		if ((own > all ? own : all) != 1) /* the greater one counts; 2 is loose */
			continue;
		fail("strict on %s, which is fine if the route to its clients is there too; if "
		     "requests "
		     "vanish: sysctl -w net.ipv4.conf.%s.rp_filter=2",
		     i->name, i->name);
		return HINT;
	}
	return fail("not strict"), GOOD;
}

/* linux/netfilter.h, which does not go together with netinet/in.h */
enum { NFPROTO_INET = 1, NFPROTO_IPV4 = 2, NFPROTO_IPV6 = 10, NF_INET_FORWARD = 2, NF_DROP = 0, NF_ACCEPT = 1 };

#define MAX_FORWARDS 16 /* chains; with more of them --check says that it could not look */

/* The chains of nftables (of iptables too, but for the legacy one) through which forwarded packets go. */
struct forwards {
	int n;
	bool unseen;
	struct forward {
		uint8_t family;
		char table[NFT_NAME_MAXLEN], name[NFT_NAME_MAXLEN];
		int verdict; /* on what none of its rules decides: NF_ACCEPT, NF_DROP */
		bool decided; /* ... by a rule for every packet, before the policy */
	} at[MAX_FORWARDS];
};

static const char *const nft_families[] = { [NFPROTO_INET] = "inet", [NFPROTO_IPV4] = "ip", [NFPROTO_IPV6] = "ip6" };

/* A chain: if forwarded packets go through it, into *found, a struct forwards, with its policy. */
static void on_chain(void *found, const struct nlmsghdr *h)
{
	const struct nfgenmsg *g = NLMSG_DATA(h);
	struct forward chain = { .family = g->nfgen_family, .verdict = NF_ACCEPT };
	int left = h->nlmsg_len - NLMSG_LENGTH(sizeof(*g));
	struct forwards *f = found;
	uint32_t hook = 0;

	f->unseen |= h->nlmsg_type == NLMSG_ERROR;
	if (h->nlmsg_type != (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN) ||
	    chain.family >= ARRAY_SIZE(nft_families) || !nft_families[chain.family])
		return;
	for (const struct rtattr *a = (void *)(g + 1); RTA_OK(a, left); a = RTA_NEXT(a, left))
		switch (a->rta_type & NLA_TYPE_MASK) {
		case NFTA_CHAIN_TABLE: snprintf(chain.table, sizeof(chain.table), "%s", (char *)RTA_DATA(a)); break;
		case NFTA_CHAIN_NAME: snprintf(chain.name, sizeof(chain.name), "%s", (char *)RTA_DATA(a)); break;
		case NFTA_CHAIN_POLICY: chain.verdict = ntohl(*(uint32_t *)RTA_DATA(a)); break;
		case NFTA_CHAIN_HOOK: /* its first member is the hook's number */
			hook = ntohl(*(uint32_t *)RTA_DATA((struct rtattr *)RTA_DATA(a)));
		}
	if (hook == NF_INET_FORWARD && f->n < MAX_FORWARDS)
		f->at[f->n++] = chain;
	else if (hook == NF_INET_FORWARD)
		f->unseen = true;
}

/* The member of this type in a nest of attributes, NULL: none. */
static const struct rtattr *attribute(const struct rtattr *nest, int type)
{
	int left = nest ? RTA_PAYLOAD(nest) : 0;

	for (const struct rtattr *a = nest ? RTA_DATA(nest) : NULL; RTA_OK(a, left); a = RTA_NEXT(a, left))
		if ((a->rta_type & NLA_TYPE_MASK) == type)
			return a;
	return NULL;
}

/* What the expressions of a rule do with every packet: NF_DROP (rejecting is that too), NF_ACCEPT;
 * -1: neither, or not with every one. */
static int rule_verdict(const struct rtattr *expressions)
{
	int left = RTA_PAYLOAD(expressions), code;

	for (const struct rtattr *e = RTA_DATA(expressions); RTA_OK(e, left); e = RTA_NEXT(e, left)) {
		const struct rtattr *name = attribute(e, NFTA_EXPR_NAME), *data = attribute(e, NFTA_EXPR_DATA);
		const char *is = name ? RTA_DATA(name) : "";

		if (!strcmp(is, "counter") || !strcmp(is, "log"))
			continue;
		if (!strcmp(is, "reject"))
			return NF_DROP;
		if (!strcmp(is, "target")) { /* of iptables */
			name = attribute(data, NFTA_TARGET_NAME);
			return name && !strcmp(RTA_DATA(name), "REJECT") ? NF_DROP : -1;
		}
		data = strcmp(is, "immediate") ? NULL : attribute(data, NFTA_IMMEDIATE_DATA);
		data = attribute(attribute(data, NFTA_DATA_VERDICT), NFTA_VERDICT_CODE);
		code = data ? (int)ntohl(*(uint32_t *)RTA_DATA(data)) : -1;
		return code == NF_DROP || code == NF_ACCEPT ? code : -1;
	}
	return -1;
}

/* A rule: if it is one for every packet, and the first such of its chain, that decides. */
static void on_rule(void *found, const struct nlmsghdr *h)
{
	const struct nfgenmsg *g = NLMSG_DATA(h);
	const struct rtattr *expressions = NULL;
	int left = h->nlmsg_len - NLMSG_LENGTH(sizeof(*g)), verdict;
	const char *table = "", *chain = "";
	struct forwards *f = found;

	f->unseen |= h->nlmsg_type == NLMSG_ERROR;
	if (h->nlmsg_type != (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE))
		return;
	for (const struct rtattr *a = (void *)(g + 1); RTA_OK(a, left); a = RTA_NEXT(a, left))
		switch (a->rta_type & NLA_TYPE_MASK) {
		case NFTA_RULE_TABLE: table = RTA_DATA(a); break;
		case NFTA_RULE_CHAIN: chain = RTA_DATA(a); break;
		case NFTA_RULE_EXPRESSIONS: expressions = a;
		}
	verdict = expressions ? rule_verdict(expressions) : -1;
	for (struct forward *i = f->at; i < f->at + f->n && verdict >= 0; i++)
		if (!i->decided && i->family == g->nfgen_family && !strcmp(i->table, table) && !strcmp(i->name, chain)) {
			i->verdict = verdict;
			i->decided = true;
		}
}

/* Asks nftables for all of one kind. */
static void ask_nftables(struct forwards *f, int fd, int what, void (*on)(void *, const struct nlmsghdr *))
{
	struct {
		struct nlmsghdr h;
		struct nfgenmsg g;
	} ask = { .h = { .nlmsg_len = sizeof(ask),
			 .nlmsg_type = NFNL_SUBSYS_NFTABLES << 8 | what,
			 .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP } };

	if (send(fd, &ask, sizeof(ask), 0) < 0 || !netlink_wait(fd, on, f))
		f->unseen = true;
}

/* The same of the legacy iptables, whose headers do not go together with netinet/in.h either:
 * what the kernel's struct ipt_getinfo, ipt_get_entries and ipt_entry or ip6t_entry are. The first
 * rule for every packet decides; a chain ends with its policy, which is one. 1 if that drops, 0 if
 * not or if there is no such table, for asking would make it; -1: it cannot be looked at. */
static int legacy_drops(bool v4)
{
	struct {
		char table[32];
		uint32_t hooks, begin[5], policy[5], n, size;
	} info = { .table = "filter" };
	const int get_info = 64, get_entries = 65, level = v4 ? SOL_IP : SOL_IPV6;
	FILE *tables = fopen(v4 ? "/proc/net/ip_tables_names" : "/proc/net/ip6_tables_names", "re");
	socklen_t len = sizeof(info);
	const size_t what = v4 ? 84 : 136, offsets = what + 4, head = v4 ? 112 : 168; /* of an entry */
	bool there = false, every;
	char line[64], *all;
	uint16_t offset[2]; /* of the target, of the next entry */
	int32_t verdict = 0;
	int fd, err;

	if (!tables)
		return errno == ENOENT ? 0 : -1;
	while (fgets(line, sizeof(line), tables))
		there |= !strcmp(line, "filter\n");
	fclose(tables);
	if (!there)
		return 0;
	fd = socket(v4 ? AF_INET : AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	err = getsockopt(fd, level, get_info, &info, &len);
	len = 40 + info.size; /* the entries begin at a multiple of 8 */
	all = mem(NULL, len);
	memcpy(all, info.table, 32);
	memcpy(all + 32, &info.size, 4);
	err = err || getsockopt(fd, level, get_entries, all, &len);
	close(fd);
	for (size_t at = info.begin[NF_INET_FORWARD]; !err && !verdict && at <= info.policy[NF_INET_FORWARD]; at += offset[1]) {
		const char *entry = all + 40 + at, *target;

		memcpy(offset, entry + offsets, sizeof(offset));
		target = entry + offset[0];
		every = offset[0] == head && !*entry && !memcmp(entry, entry + 1, what - 1);
		if (every && !strcmp(target + 2, "REJECT"))
			verdict = -NF_DROP - 1;
		else if (every && !target[2]) /* a verdict, or a chain to go through */
			memcpy(&verdict, target + 32, sizeof(verdict));
		if (verdict >= 0)
			verdict = 0;
	}
	free(all);
	return err ? -1 : verdict == -NF_DROP - 1;
}

static enum verdict check_firewall(int what)
{
	bool none = access("/sys/module/nf_tables", F_OK) && !access("/proc/modules", F_OK);
	int fd, legacy = legacy_drops(true), legacy6 = legacy_drops(false);
	struct forwards f = { 0 };

	(void)what;
	if (!none) { /* not asked where it is not loaded: that would load it */
		fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_NETFILTER);
		ask_nftables(&f, fd, NFT_MSG_GETCHAIN, on_chain);
		if (f.n)
			ask_nftables(&f, fd, NFT_MSG_GETRULE, on_rule);
		close(fd);
	}
	for (struct forward *i = f.at; i < f.at + f.n; i++)
		if (i->verdict == NF_DROP) {
			const char *family = nft_families[i->family];

			fail("%s %s %s drops by default; if requests vanish: nft insert rule %s %s %s iifname %s "
			     "accept, and with oifname",
			     family, i->table, i->name, family, i->table, i->name, agent.door->name);
			return HINT;
		}
	if (legacy > 0 || legacy6 > 0) {
		const char *tool = legacy > 0 ? "iptables-legacy" : "ip6tables-legacy";

		fail("FORWARD of %s drops by default; if requests vanish: %s -I FORWARD -i %s -j "
		     "ACCEPT, and with -o", tool, tool, agent.door->name);
		return HINT;
	}
	if (f.unseen || legacy < 0 || legacy6 < 0)
		return fail("cannot be looked at, see nft list ruleset and iptables-legacy -S"), UNSEEN;
	return fail("no chain drops by default"), GOOD;
}

static enum verdict check_agent(int what)
{
	int fd = pin_dir_fd();
	bool runs = fd >= 0 && pin_dir_locked(fd);

	(void)what;
	fail("%s%s", runs ? "runs already, " : "none runs yet",
	     runs ? agent_where(pin_dir_holder(fd)) : "");
	close(fd);
	return GOOD;
}

/* --from, or the credentials. */
static enum verdict check_source(int what)
{
	(void)what;
	if (opt.from ? from_read(&agent.model, opt.from) : api_open(&agent.api))
		return MEND;
	if (opt.from)
		fail("%s can be read", opt.from);
	else
		fail("%s leads to %s", agent.api.config.origin, api_source(&agent.api));
	return GOOD;
}

/* One list or one watch of its own, so that each verb shows. */
static enum verdict check_resource(int what)
{
	static bool lost; /* the server was not reached */
	struct agent *a = &agent;
	enum kind kind = what & ~LOOK_WATCH;
	struct watch *w = &a->api.watch[kind];
	bool watch = what & LOOK_WATCH, done = false, reached = false, denied = false;

	if (opt.from)
		return fail("not needed, with --from"), GOOD;
	api_stop(&a->api);
	if (lost || api_open(&a->api))
		return fail("not looked at, for the API server was not reached"), UNSEEN;
	memset(a->model.synced, 0, sizeof(a->model.synced));
	a->api.once = !watch;
	api_start(&a->api, a->epoll_fd, WAKE_API);
	for (int k = 0; k < N_KINDS; k++)
		a->api.watch[k].deadline = k == (int)kind ? 0 : INT64_MAX;
	w->listed = watch; /* a stream is a watch and no list */
	*why = 0;
	while (!done && !denied && !a->stop && !a->api.failed && !a->api.n_said) {
		loop_round(a);
		denied = kind == SERVICE_CIDRS && !strncmp(why, "40", 2); /* as older servers do */
		reached |= w->state >= WATCH_ASKING;
		done = watch ? w->state == WATCH_FOLLOWING : a->model.synced[kind];
	}
	if (a->stop)
		return fail("not looked at: stopped"), UNSEEN;
	if (denied || (kind == SERVICE_CIDRS && a->api.n_said))
		return fail("%s; packets to unused addresses are not dropped", why), HINT;
	if (done && !a->api.n_said)
		return fail("allowed"), GOOD;
	lost = !reached;
	return kind == NODES && !lost ? HINT : MEND;
}

static enum verdict check_node(int what)
{
	(void)what;
	if (!agent.model.synced[NODES])
		return fail("not looked at, for nodes could not be listed"), UNSEEN;
	if (agent.model.n_of[NODES])
		return fail("%s is a Node of the cluster", opt.node), GOOD;
	fail("no Node %s was seen, so no backend counts as local: --node names another", opt.node);
	return HINT;
}

/* What tailscaled says, asked once; NULL with why. */
static const struct json *local_look(const char *target)
{
	static struct json prefs, status;
	struct json *j = *target == 'p' ? &prefs : &status;

	return j->n_tok || !call_wait("GET", target, "", j) ? j : NULL;
}

/* Has this object's member, a list, a range that `route` is in, or overlaps? But for all the
 * world, which is another offer. */
static bool local_has(const struct json *j, int object, const char *member, const char *route,
		      bool overlaps)
{
	int list = json_get(j, object, member);
	struct cidr want, c;

	cidr_parse(route + 1, strlen(route) - 2, &want); /* it has quotes */
	for (int i = json_first(j, list); i >= 0; i = json_next(j, list, i))
		if (cidr_parse(j->text + j->tok[i].start, j->tok[i].end - j->tok[i].start, &c) &&
		    c.bits > (addr_is_v4(&c.addr) ? 96 : 0) && (overlaps || c.bits <= want.bits) &&
		    cidr_overlap(&c, &want))
			return true;
	return false;
}

/* The ranges that should come to this node. */
static struct buf check_ranges(void)
{
	static bool listed;

	if (!listed && !opt.from)
		check_resource(SERVICE_CIDRS);
	listed = true;
	return routes_of(model_ranges_of(&agent.model, true));
}

static enum verdict check_advertised(int what)
{
	const struct json *prefs = local_look("prefs"), *status = prefs ? local_look("status") : NULL;
	int self = status ? json_get(status, 0, "Self") : -1;
	struct buf ranges = { 0 };

	(void)what;
	if (!status)
		return UNSEEN;
	ranges = check_ranges();
	ROUTES_EACH (r, &ranges) {
		if (!local_has(prefs, 0, "AdvertiseRoutes", r->text, false) && opt.advertise)
			return fail("%s is not advertised yet: the agent will see to it", r->text), HINT;
		if (!local_has(prefs, 0, "AdvertiseRoutes", r->text, false))
			return fail("%s is not advertised by tailscaled here: --advertise does that, or "
				    "tailscale set --advertise-routes=", r->text), MEND;
		if (!json_eq(status, json_get(status, 0, "BackendState"), "Running"))
			return fail("%s is, but tailscaled is not connected: tailscale up", r->text), MEND;
		if (!local_has(status, self, "AllowedIPs", r->text, false))
			return fail("%s is, but not approved, or another router has it: see the admin "
				    "console, or headscale nodes list-routes", r->text), HINT;
	}
	fail(ranges.len ? "and approved" : "no range is known: the API server shows no ServiceCIDRs");
	return ranges.len ? GOOD : UNSEEN;
}

/* Which is good for the same cluster, and bad for another with the same range. */
static enum verdict check_routers(int what)
{
	const struct json *j = local_look("status");
	int peers = j ? json_get(j, 0, "Peer") : -1;
	struct buf ranges = { 0 }, name = { 0 };

	(void)what;
	if (!j)
		return UNSEEN;
	ranges = check_ranges();
	ROUTES_EACH (r, &ranges)
		for (int i = json_first(j, peers); i >= 0; i = json_next(j, peers, i)) {
			if (!local_has(j, i + 1, "AllowedIPs", r->text, true) &&
			    !local_has(j, i + 1, "PrimaryRoutes", r->text, true))
				continue;
			json_str(j, json_get(j, i + 1, "HostName"), &name);
			fail("%s has %s too: if that is another cluster, give this one a range of "
			     "its own by --map", name.at, r->text);
			return HINT;
		}
	return fail("none with these ranges"), GOOD;
}

static enum verdict check_masquerade(int what)
{
	const struct json *prefs = local_look("prefs");

	(void)what;
	if (!prefs)
		return UNSEEN;
	if (!json_is_word(prefs, json_get(prefs, 0, "NoSNAT"), "true"))
		return fail("by tailscaled: pods see this node's address; tailscale set "
			    "--snat-subnet-routes=false shows them the clients'"), GOOD;
	if (opt.snat)
		return fail("by --snat"), GOOD;
	fail("tailscaled does none: pods see clients' own addresses; replies of those on other "
	     "nodes need flannel, else: --snat auto");
	return HINT;
}

/* Ours and the node's own must not be the same: conntrack would give its answers to one of them. */
static enum verdict check_ports(int what)
{
	FILE *f = fopen("/proc/sys/net/ipv4/ip_local_port_range", "re");
	int least, last = 0;

	(void)what;
	if (f && fscanf(f, "%d %d", &least, &last) != 2)
		last = 0;
	if (f)
		fclose(f);
	if (!opt.snat)
		return fail("none is taken: no --snat"), GOOD;
	if (!last)
		return fail("cannot be read: net.ipv4.ip_local_port_range"), UNSEEN;
	fail("--snat takes those from %d, this node's own are up to %d%s", TL_SNAT_LEAST, last,
	     last < TL_SNAT_LEAST ? "" : ": sysctl -w net.ipv4.ip_local_port_range='32768 60999'");
	return last < TL_SNAT_LEAST ? GOOD : HINT;
}

static const struct {
	const char *name;
	enum verdict (*look)(int what);
	int what;
} checks[] = {
	{ "privileges", check_privileges, 0 },
	{ "kernel", check_kernel, 0 },
	{ "bpffs", check_bpffs, 0 },
	{ "interface", check_iface, 0 },
	{ "IPv4 forwarding", check_forwarding, AF_INET },
	{ "IPv6 forwarding", check_forwarding, AF_INET6 },
	{ "rp_filter", check_rp_filter, 0 },
	{ "firewall", check_firewall, 0 },
	{ "agent", check_agent, 0 },
	{ "objects", check_source, 0 },
	{ "list services", check_resource, SERVICES },
	{ "watch services", check_resource, SERVICES | LOOK_WATCH },
	{ "list endpointslices", check_resource, SLICES },
	{ "watch endpointslices", check_resource, SLICES | LOOK_WATCH },
	{ "watch nodes", check_resource, NODES | LOOK_WATCH },
	{ "list nodes", check_resource, NODES },
	{ "own node", check_node, 0 },
	{ "list servicecidrs", check_resource, SERVICE_CIDRS },
	{ "watch servicecidrs", check_resource, SERVICE_CIDRS | LOOK_WATCH },
	{ "service CIDR advertised", check_advertised, 0 },
	{ "second router", check_routers, 0 },
	{ "masquerade", check_masquerade, 0 },
	{ "source ports", check_ports, 0 },
};

/* A line for each; 1 if something must be fixed. */
static int cmd_check(void)
{
	int mend = 0;

	if (loop_open(&agent))
		return -1;
	loud = loud > 1 ? loud : -1; /* what is wrong stands in its line */
	for (size_t i = 0; i < ARRAY_SIZE(checks); i++) {
		enum verdict v = checks[i].look(checks[i].what);

		printf("%-5s %-23s %s\n", verdict_words[v], checks[i].name, why);
		fflush(stdout);
		mend += v == MEND;
	}
	return mend ? 1 : 0;
}

static int cmd_version(void)
{
	printf("tail_lifter %s\n", TAIL_LIFTER_VERSION);
	return 0;
}

/* === options ==============================================================
 * One table: parsing, --help and the README's table come from it. */
struct option_row {
	const char *form; /* "-x, --name VALUE" */
	const char *text;
	int (*take)(const struct option_row *, const char *value); /* 0, or -1 with why */
	void *to;
	const char *env;
	int (*command)(void);
};

/* "name" or "name VALUE" */
static const char *row_name(const struct option_row *o)
{
	return strstr(o->form, "--") + 2;
}

/* "VALUE", or NULL: it takes none. */
static const char *row_value(const struct option_row *o)
{
	const char *space = strchr(row_name(o), ' ');

	return space ? space + 1 : NULL;
}

static int cmd_help(void);

static int take_flag(const struct option_row *o, const char *value)
{
	(void)value;
	*(bool *)o->to = true;
	return 0;
}

static int take_loud(const struct option_row *o, const char *value)
{
	(void)value;
	loud += o->form[1] == 'v' ? 1 : -1;
	return 0;
}

static int take_text(const struct option_row *o, const char *value)
{
	*(const char **)o->to = value;
	return *value || o->to == &opt.selector ? 0 : fail("--%s is missing", row_name(o));
}

/* Which of the words between bars it is. */
static int take_word(const struct option_row *o, const char *value)
{
	size_t n = strlen(value);
	unsigned which = 0;

	for (const char *s = row_value(o); *s; s += strcspn(s, "|"), s += *s == '|', which++)
		if (strcspn(s, "|") == n && !strncmp(s, value, n))
			return *(unsigned *)o->to = which, 0;
	return fail("--%s: not %s", row_name(o), value);
}

static int take_json(const struct option_row *o, const char *value)
{
	opt.json = !strcmp(value, "json");
	return opt.json ? 0 : fail("--%s: not %s", row_name(o), value);
}

static int take_cidr(const struct option_row *o, const char *s, size_t n, struct cidr *c)
{
	struct in6_addr masked;

	if (!cidr_parse(s, n, c))
		return fail("--%s: %.*s is no range like 10.8.43.0/24", row_name(o), (int)n, s);
	masked = c->addr;
	addr_mask(&masked, c->bits);
	if (memcmp(&masked, &c->addr, sizeof(masked)))
		return fail("--%s: %.*s has bits set behind its length", row_name(o), (int)n, s);
	return 0;
}

static int take_vip_range(const struct option_row *o, const char *value)
{
	opt.has_vip_range = true;
	return take_cidr(o, value, strlen(value), &opt.vip_range);
}

static int take_map(const struct option_row *o, const char *value)
{
	const char *eq = strchr(value, '=');
	struct map_option m;

	if (!eq)
		return fail("--%s: not %s", row_name(o), value);
	if (take_cidr(o, value, eq - value, &m.from) || take_cidr(o, eq + 1, strlen(eq + 1), &m.to))
		return -1;
	if (m.from.bits != m.to.bits || addr_is_v4(&m.from.addr) != addr_is_v4(&m.to.addr))
		return fail("--map: %s: both ranges must be of one family and length", value);
	opt.maps = mem(opt.maps, (opt.n_maps + 1) * sizeof(m));
	opt.maps[opt.n_maps++] = m;
	return 0;
}

static int take_namespace(const struct option_row *o, const char *value)
{
	opt.namespaces = mem(opt.namespaces, (opt.n_namespaces + 1) * sizeof(value));
	opt.namespaces[opt.n_namespaces++] = value;
	return *value ? 0 : fail("--%s is missing", row_name(o));
}

static int take_ifaces(const struct option_row *o, const char *s)
{
	(void)o;
	for (agent.n_iface = 0;; s++) {
		size_t n = strcspn(s, ",");

		if (!n || n >= IF_NAMESIZE || memchr(s, '/', n) || memchr(s, ' ', n) ||
		    agent.n_iface == MAX_IFACES)
			return fail("--iface: up to %d names of at most %d characters, with commas "
				    "between, and not \"%s\"",
				    MAX_IFACES, IF_NAMESIZE - 1, s);
		memset(agent.door[agent.n_iface].name, 0, IF_NAMESIZE);
		memcpy(agent.door[agent.n_iface++].name, s, n);
		agent.n_doors = agent.n_iface;
		s += n;
		if (!*s)
			return 0;
	}
}

static int take_flows(const struct option_row *o, const char *s)
{
	char *end;
	unsigned long n = strtoul(s, &end, 10);

	if (!isdigit((unsigned char)*s) || *end || n < 1024 || n > 16 << 20)
		return fail("--%s: %s is not a number from 1024 to %d", row_name(o), s, 16 << 20);
	opt.flows = n;
	return 0;
}

/* 127.0.0.1:9000, [::1]:9000; :9000 is any address. */
static int take_metrics(const struct option_row *o, const char *s)
{
	const char *colon = strrchr(s, ':'), *port = colon ? colon + 1 : "";
	size_t n = colon ? colon - s : 0;
	bool v6 = n > 1 && s[0] == '[' && s[n - 1] == ']' && memchr(s, ':', n);
	unsigned long number = strtoul(port, NULL, 10);

	opt.metrics = in6addr_any;
	opt.metrics_port = number;
	if (!*port || strspn(port, "0123456789") != strlen(port) || number < 1 || number > 65535 ||
	    (v6 ? !addr_parse(s + 1, n - 2, &opt.metrics) :
		  n && (memchr(s, ':', n) || !addr_parse(s, n, &opt.metrics))))
		return fail("--%s: %s is nothing like 127.0.0.1:10430, [::1]:10430 or :10430",
			    row_name(o), s);
	return 0;
}

static const struct option_row options[] = {
	{ "    --once", "attach, sync once, exit; the datapath stays", .command = cmd_once },
	{ "    --status", "interfaces, services, flows, counters; of one: --status NAMESPACE/NAME",
	  .command = cmd_status },
	{ "    --check", "what would keep it from working here, with the remedy",
	  .command = cmd_check },
	{ "    --dry-run", "print what would be programmed", .command = cmd_dry_run },
	{ "    --cleanup", "detach, unpin, leave no trace", .command = cmd_cleanup },
	{ "    --version", "print the version", .command = cmd_version },
	{ "-h, --help", "print this", .command = cmd_help },
	{ "-i, --iface NAME[,NAME]", "VPN interfaces (default tailscale0); need not exist yet",
	  .take = take_ifaces, .env = "IFACE" },
	{ "    --kubeconfig FILE", "default: in-cluster, else k3s's, RKE2's, ~/.kube/config",
	  .take = take_text, .to = &opt.kubeconfig, .env = "KUBECONFIG" },
	{ "    --from FILE",
	  "read objects as JSON (- is stdin), not from a server; again on SIGHUP",
	  .take = take_text, .to = &opt.from },
	{ "    --node NAME", "own node (default: the host name)", .take = take_text,
	  .to = &opt.node, .env = "NODE_NAME" },
	{ "    --selector SEL", "serve only services with these labels, as kubectl -l",
	  .take = take_text, .to = &opt.selector },
	{ "-n, --namespace NS", "serve only services of this namespace; may be repeated",
	  .take = take_namespace },
	{ "    --vip-range CIDR", "also give each service an address in this range",
	  .take = take_vip_range },
	{ "    --map FROM=TO",
	  "serve the ClusterIPs of range TO at range FROM too; may be repeated", .take = take_map },
	{ "    --snat off|auto|on", "source NAT towards backends (default off)", .take = take_word,
	  .to = &opt.snat },
	{ "    --fast", "local backends skip the host's stack", .take = take_flag,
	  .to = &opt.fast },
	{ "    --flows N", "capacity of ct_map (default 65536)", .take = take_flows },
	{ "    --advertise", "keep the service CIDR among tailscaled's advertised routes",
	  .take = take_flag, .to = &opt.advertise },
	{ "    --metrics ADDR:PORT", "answer /metrics (Prometheus), /healthz and /readyz there",
	  .take = take_metrics },
	{ "    --pin-dir DIR", "where maps are pinned (default /sys/fs/bpf/tail_lifter)",
	  .take = take_text, .to = &opt.pin_dir },
	{ "-o, --output json", "print JSON (--status, --dry-run)", .take = take_json },
	{ "-v, --verbose", "say more", .take = take_loud },
	{ "-q, --quiet", "say less", .take = take_loud },
};

static int cmd_help(void)
{
	printf("tail_lifter: every ClusterIP reachable from the tailnet\n\n"
	       "usage: tail_lifter [OPTIONS]   attach, sync, stay; SIGTERM leaves the datapath "
	       "working\n"
	       "       tail_lifter COMMAND [OPTIONS]\n");
	for (const struct option_row *o = options; o < options + ARRAY_SIZE(options); o++) {
		if (o == options || !o->command != !o[-1].command)
			printf("\n%s:\n", o->command ? "commands" : "options");
		printf("  %-26s  %s%s%s\n", o->form, o->text, o->env ? "; env " : "",
		       o->env ? o->env : "");
	}
	return fflush(stdout) ? fail("cannot write: %s", strerror(errno)) : 0;
}

/* The row of an argument: --name, --name=value, -x, -xvalue. `*value` is what is
 * attached to it, NULL: nothing. NULL with why. */
static const struct option_row *option_of(const char *arg, const char **value)
{
	bool word = arg[1] == '-';
	const char *name = arg + 1 + word;
	size_t n = word ? strcspn(name, "=") : 1;

	*value = name[n] ? name + n + word : NULL;
	for (const struct option_row *o = options; o < options + ARRAY_SIZE(options); o++) {
		if (word ? strcspn(row_name(o), " ") != n || strncmp(row_name(o), name, n) :
			   *o->form != '-' || o->form[1] != *name)
			continue;
		if (!*value || row_value(o))
			return o;
		return fail("--%s takes no value", row_name(o)), NULL;
	}
	return fail("unknown option %s", arg), NULL;
}

/* What holds whatever set the options; and the default that is not constant. */
static int options_check(void)
{
	static char host[MAX_NAME + 1];

	if (!opt.node) {
		gethostname(host, sizeof(host) - 1);
		for (char *c = host; *c; c++)
			*c = tolower((unsigned char)*c);
		opt.node = host;
	}
	if (strlen(opt.node) > MAX_NAME)
		return fail("--node: %s is too long for a node's name", opt.node);
	if (*opt.pin_dir != '/')
		return fail("--pin-dir: %s is not an absolute path", opt.pin_dir);
	return model_init(&agent.model, &opt);
}

/* Fills opt from the environment and argv; `*command` is what to do. 0, or -1
 * with why. */
static int options_read(int argc, char **argv, int (**command)(void))
{
	const struct option_row *o, *chosen = NULL;
	const char *value;

	opt = (struct options){ .flows = TL_FLOWS, .pin_dir = BPFFS "/tail_lifter" };
	take_ifaces(NULL, "tailscale0");
	for (o = options; o < options + ARRAY_SIZE(options); o++) {
		value = o->env ? getenv(o->env) : NULL;
		if (value && *value && o->take(o, value))
			return -1;
	}
	for (int i = 1; i < argc; i++) {
		if (argv[i][0] != '-' || !argv[i][1]) {
			if (*command != cmd_status || opt.status_of || !strchr(argv[i], '/'))
				return fail("stray word %s", argv[i]);
			opt.status_of = argv[i];
			continue;
		}
		o = option_of(argv[i], &value);
		if (!o)
			return -1;
		if (row_value(o) && !value && !(value = argv[++i]))
			return fail("--%s is missing", row_name(o));
		if (o->command && chosen && chosen != o)
			return fail("--%s and --%s are two commands", row_name(chosen),
				    row_name(o));
		if (o->command)
			*command = (chosen = o)->command;
		else if (o->take(o, value))
			return -1;
	}
	return *command == cmd_help ? 0 : options_check();
}

/* What this version knows the words for, and does not do. */
static int options_unbuilt(void)
{
	return opt.fast ? fail("--fast is not in this version") : 0;
}

/* === main ================================================================= */
/* What is constant once the program is relocated becomes read-only. A dynamic
 * loader would have done this; a static-pie has none. */
static void protect_relro(void)
{
	const ElfW(Phdr) *at = (const ElfW(Phdr) *)getauxval(AT_PHDR),
			 *end = at + getauxval(AT_PHNUM);
	uintptr_t page = getauxval(AT_PAGESZ), base = 0, from, to;

	for (const ElfW(Phdr) *p = at; p < end; p++)
		if (p->p_type == PT_PHDR)
			base = (uintptr_t)at - p->p_vaddr;
	for (const ElfW(Phdr) *p = at; p < end && base; p++)
		if (p->p_type == PT_GNU_RELRO) {
			from = (base + p->p_vaddr) & -page; /* the segment begins there */
			to = (base + p->p_vaddr + p->p_memsz) & -page;
			if (to > from)
				mprotect((void *)from, to - from, PROT_READ);
		}
}

int main(int argc, char **argv)
{
	int (*command)(void) = cmd_run, r;

	protect_relro();
	if (options_read(argc, argv, &command)) {
		warn("%s; usage: tail_lifter [COMMAND] [OPTIONS], --help lists them", why);
		return 2;
	}
	libbpf_set_print(on_libbpf);
	r = options_unbuilt() ? -1 : command();
	if (r < 0)
		warn("%s", why);
	return r ? 1 : 0;
}
