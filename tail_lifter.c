// SPDX-License-Identifier: MIT
/* tail_lifter.c: the agent of TailLifter, in one file. Start at main(), at the end.
 *
 * It learns Services, EndpointSlices and its own Node, resolves them as kube-proxy
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
 * Order of the file, which is the order in which things happen:
 *   limits, saying things, basics, options             everybody's
 *   TLS, HTTP, JSON                                     know no Kubernetes
 *   objects, model, resolve, printing, --from           know no kernel
 *   maps, interfaces, doors                             know no API server
 *   kubeconfig, API server, loop                        time
 *   commands, options, main
 * A stage returns a value and never calls a later one. `grep '^/\* ==='` lists them.
 *
 * One process, one thread, one epoll; nothing blocks, nothing polls. Whatever
 * comes from outside may be wrong: it gets one line and is tried again.
 *
 * Outside interfaces
 *   API      GET /api/v1/services, /apis/discovery.k8s.io/v1/endpointslices,
 *            /api/v1/nodes (own node only); list and watch
 *   files    kubeconfig and what it names; see "kubeconfig"
 *   bpffs    the pin directory; see "doors" for what is in it
 *   netlink  RTNLGRP_LINK; clsact and cls_bpf where there is no tcx
 *   signals  SIGTERM and SIGINT end it, SIGHUP reads --from anew
 *   env      IFACE, KUBECONFIG, NODE_NAME, KUBERNETES_SERVICE_HOST and _PORT
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
#include <linux/if_link.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <mbedtls/base64.h>
#include <mbedtls/entropy.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/psa_util.h>
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
#include <sys/types.h>
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

/* A range of addresses; `bits` counts in the 128 of the mapped form (an IPv4
 * /16 has 112). */
struct cidr {
	struct in6_addr addr;
	uint8_t bits;
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
	const char *selector;	/* kubectl -l, NULL or "": all; checked by selector_parse */
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
	const char *metrics;
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
		{ IPPROTO_TCP, TCP_USER_TIMEOUT, 45000 } };
	struct sockaddr_in6 to6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in to4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	bool v4 = addr_is_v4(addr);
	void *to = v4 ? (void *)&to4 : (void *)&to6;

	to6.sin6_addr = *addr;
	memcpy(&to4.sin_addr, addr->s6_addr + 12, 4);
	*t = (struct tls){ .state = TLS_CONNECTING, .want = EPOLLOUT, .trust = trust };
	snprintf(t->name, sizeof(t->name), "%s", name);
	mbedtls_ssl_init(&t->ssl);
	t->fd = socket(v4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	for (size_t i = 0; i < ARRAY_SIZE(options); i++)
		setsockopt(t->fd, options[i][0], options[i][1], &options[i][2], sizeof(int));
	if (t->fd < 0 ||
	    (connect(t->fd, to, v4 ? sizeof(to4) : sizeof(to6)) && errno != EINPROGRESS))
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
		h->retry_after = strlen(value) < 9 ? atol(value) : 0;
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
/* === JSON (knows no Kubernetes) ===========================================
 * jsmn finds the tokens, but takes much that is no JSON: so RFC 8259 and UTF-8
 * are checked before, in one walk by descent. */
#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS
#include <jsmn.h>

#define MAX_EVENT 4096 /* what a watch event may add around its object */

/* How many bytes from `at` are an ordinary part of a string: most bytes are. */
static size_t json_plain(const char *at, size_t n)
{
	size_t i = 0;

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
	if (g->at == g->end || !*g->at || !strchr(of, *g->at))
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

	if (!object && !grammar_any(g, "[")) {
		for (size_t i = 0, n; i < ARRAY_SIZE(words); i++)
			if ((size_t)(g->end - g->at) >= (n = strlen(words[i])) &&
			    !memcmp(g->at, words[i], n)) {
				g->at += n;
				return true;
			}
		return g->at < g->end && *g->at == '"' ? grammar_string(g) : grammar_number(g);
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

/* One parsed value: token 0 is the whole, its members and elements follow.
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
	for (int i = 0; i < j->n_tok; i++) /* of a beginning: what was not closed */
		j->tok[i].end = j->tok[i].end < 0 ? (int)good : j->tok[i].end;
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
		int n = json_char(&s, utf8);

		if (!n)
			return -1;
		buf_add(out, utf8, n);
	}
	return 0;
}

/* Whether the inside of a JSON string, still escaped, denotes these bytes. */
static bool json_same(const char *s, size_t len, const char *plain, size_t n)
{
	const char *end = s + len;
	char utf8[4];

	if (!memchr(s, '\\', len)) /* nearly always */
		return len == n && !memcmp(s, plain, n);
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
	return at + 1 < j->n_tok && j->tok[at + 1].start < j->tok[at].end ? at + 1 : -1;
}

static int json_next(const struct json *j, int at, int i)
{
	int end;

	i += j->tok[at].type == JSMN_OBJECT && i + 1 < j->n_tok && j->tok[i + 1].parent == i;
	for (end = j->tok[i++].end; i < j->n_tok && j->tok[i].start < end; i++)
		;
	return i < j->n_tok && j->tok[i].start < j->tok[at].end ? i : -1;
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

		used = 1;
		if (s->in_string) {
			size_t plain = s->escaped ? 0 : json_plain(*at, *n);

			used = plain ? plain : 1;
			s->in_string = plain || s->escaped || c != '"';
			s->escaped = !plain && !s->escaped && c == '\\';
			split_keep(s, *at, used);
			continue;
		}
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
 * A Service, EndpointSlice or Node becomes one compact block, or is refused
 * with a line that names it and the field. Nothing of the text stays. */
enum kind { SERVICES, SLICES, NODES, N_KINDS };

static const struct {
	const char *name, *api;
} kinds[N_KINDS] = {
	[SERVICES] = { "Service", "v1" },
	[SLICES] = { "EndpointSlice", "discovery.k8s.io/v1" },
	[NODES] = { "Node", "v1" },
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
	if (t->n == t->size) {
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
	uint32_t name; /* where it begins in the texts of its block */
	uint16_t number;
	uint8_t proto;
	bool shadowed; /* of a service: another of its ports has this number and protocol */
};

/* Of a Service. One block: it is the same service if the bytes are. */
struct spec {
	int64_t created; /* seconds since 1970; 0: not known, the oldest */
	uint32_t size, affinity;
	uint32_t n_cluster, n_external, n_lb, n_sources, n_ports;
	bool internal_local, external_local;
	bool served, gap; /* --selector and --namespace take it */
	struct in6_addr
		at[]; /* cluster, external, lb; sources; ports by name and protocol; texts */
};

static struct cidr *spec_sources(struct spec *s)
{
	return (struct cidr *)(s->at + s->n_cluster + s->n_external + s->n_lb);
}

static struct port *spec_ports(struct spec *s)
{
	return (struct port *)(spec_sources(s) + s->n_sources);
}

static const char *spec_port_name(struct spec *s, const struct port *p)
{
	return (char *)(spec_ports(s) + s->n_ports) + p->name;
}

/* Of an EndpointSlice: a block too; the same slice if what follows `of` is. */
struct slice {
	struct link link;      /* these are the model's: by namespace and name; */
	struct slice *sibling; /* the next of the same service; */
	bool seen;	       /* since the mark; */
	struct service *of;    /* whose */
	uint32_t size, n_ports, n_endpoints, texts;
	uint32_t name; /* where its own name begins in the texts */
	bool v4, gap[3];
	char at[]; /* ports by name and protocol; texts; endpoints */
};

/* An endpoint in a slice: a byte of conditions, 4 or 16 of address, then texts:
 * its node, hints ("zZONE" or "nNODE"), and an empty one. */
enum { ENDPOINT_READY = 1, ENDPOINT_SERVING = 2, ENDPOINT_TERMINATING = 4 };

static struct port *slice_ports(struct slice *s)
{
	return (struct port *)s->at;
}

/* A port's name, or the slice's own; behind them are the endpoints. */
static const char *slice_text(struct slice *s, uint32_t at)
{
	return (char *)(slice_ports(s) + s->n_ports) + at;
}

/* What object_read leaves: who it is, and what is to be kept. */
struct object {
	enum kind kind;
	bool ignored; /* by rule 1 and the like: as if it were not there */
	char *ns, *name,
		*more; /* one block; ns: "" of a Node; more: a slice's service, a Node's zone */
	struct spec *spec;
	struct slice *slice;
};

static void object_free(struct object *o)
{
	free(o->ns);
	free(o->spec);
	free(o->slice);
	*o = (struct object){ 0 };
}

/* --- label selectors, as kubectl -l ---------------------------------------- */
struct requirement {		  /* points into the text, which must stay */
	const char *key, *values; /* values: NULL, or the first */
	size_t key_len;
	bool not, set; /* !key, !=, notin; in, notin */
};

/* Which services are served: --selector and --namespace. */
struct filter {
	struct requirement *at;
	int n;
	const char **namespaces;
	int n_namespaces; /* 0: all */
};

/* The word at *s, moving *s behind it and the white space around. */
static const char *selector_word(const char **s, size_t *n)
{
	static const char space[] = " \t\r\n";
	const char *word = *s + strspn(*s, space);

	*n = strcspn(word, " \t\r\n=!(),<>");
	*s = word + *n + strspn(word + *n, space);
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

/* One requirement; NULL, or the text behind it. */
static const char *selector_requirement(struct requirement *r, const char *s)
{
	const char *word;
	size_t n;

	s += strspn(s, " \t\r\n");
	r->not = *s == '!';
	s += r->not ;
	r->key = selector_word(&s, &r->key_len);
	if (!label_valid(r->key, r->key_len, true))
		return NULL;
	if (r->not || !*s || *s == ',')
		return s;
	word = selector_word(&s, &n);
	r->set = n != 0;
	if (r->set) {
		r->not = n == 5 && !memcmp(word, "notin", 5);
		if ((!r->not &&(n != 2 || memcmp(word, "in", 2))) || *s != '(')
			return NULL;
	} else {
		r->not = *s == '!';
		s += r->not ;
		if (*s != '=')
			return NULL;
		s += !r->not &&s[1] == '=';
	}
	r->values = ++s;
	do {
		word = selector_word(&s, &n);
		if (!label_valid(word, n, false))
			return NULL;
	} while (r->set && *s == ',' && s++);
	if (r->set && *s++ != ')')
		return NULL;
	return s + strspn(s, " \t\r\n");
}

/* 0, or -1 with why. */
static int selector_parse(const char *text, struct filter *out)
{
	const char *s = text ? text : "";

	out->n = 0;
	if (!s[strspn(s, " \t\r\n")])
		return 0;
	for (;; s++) {
		struct requirement r = { 0 };

		s = selector_requirement(&r, s);
		if (!s || (*s && *s != ','))
			return fail("selector \"%s\" is not understood; write it as for kubectl -l",
				    text);
		out->at = mem(out->at, (out->n + 1) * sizeof(r));
		out->at[out->n++] = r;
		if (!*s)
			return 0;
	}
}

static bool selector_match(const struct filter *f, const struct json *j, int labels)
{
	for (int i = 0; i < f->n; i++) {
		const struct requirement *r = &f->at[i];
		int value = json_find(j, labels, r->key, r->key_len);
		const char *s = r->values, *word;
		bool hit = value >= 0 && !s;
		size_t n;

		while (value >= 0 && s && !hit) {
			word = selector_word(&s, &n);
			hit = json_eq_n(j, value, word, n);
			s = r->set && *s == ',' ? s + 1 : NULL;
		}
		if (hit == r->not )
			return false;
	}
	return true;
}

static bool filter_match(const struct filter *f, const char *ns, const struct json *j, int labels)
{
	bool in = !f->n_namespaces;

	for (int i = 0; i < f->n_namespaces; i++)
		in |= !strcmp(f->namespaces[i], ns);
	return in && selector_match(f, j, labels);
}

/* --- reading ---------------------------------------------------------------
 * The first flaw is kept in `why` and ends nothing; who reads asks at the end.
 * Every value is a token; -1 is none, as null is. */
struct reader {
	const struct json *j;
	int root;
	struct object *o;
	struct buf names; /* "NAMESPACE\0NAME\0" as far as known, then `more` */
	size_t name;	  /* where NAME begins, 0: not known */
	struct buf text;  /* the string read last */
	bool bad;
};

__attribute__((format(printf, 4, 5))) static void flaw(struct reader *r, int at, const char *key,
						       const char *fmt, ...)
{
	struct buf b = { 0 };
	char text[160];
	va_list ap;

	if (r->bad)
		return;
	r->bad = true;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	buf_printf(&b, "%s", kinds[r->o->kind].name);
	if (r->name)
		buf_printf(&b, " %s%s%.*s", r->names.at, r->name > 1 ? "/" : "", 400,
			   r->names.at + r->name);
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
	at = json_get(r->j, at, key);
	read_string(r, at);
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

static bool read_bool(struct reader *r, int at, const char *key, bool absent)
{
	at = json_get(r->j, at, key);
	if (at >= 0 && !json_is_word(r->j, at, "true") && !json_is_word(r->j, at, "false"))
		flaw(r, at, "", "must be true or false");
	return at < 0 ? absent : json_is_word(r->j, at, "true");
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

static uint8_t read_protocol(struct reader *r, int at)
{
	at = read_string(r, json_get(r->j, at, "protocol"));
	if (at < 0 || json_eq(r->j, at, "TCP"))
		return IPPROTO_TCP;
	if (json_eq(r->j, at, "UDP"))
		return IPPROTO_UDP;
	if (!json_eq(r->j, at, "SCTP"))
		flaw(r, at, "", "must be TCP, UDP or SCTP, not %.40s", r->text.at);
	return IPPROTO_SCTP;
}

/* RFC 3339 as seconds; 0 if it is not. */
static int64_t read_timestamp(const char *s)
{
	struct tm t = { 0 };
	int n = 0, hours = 0, minutes = 0;
	char sign[2] = "";

	if (sscanf(s, "%4d-%2d-%2dT%2d:%2d:%2d%n", &t.tm_year, &t.tm_mon, &t.tm_mday, &t.tm_hour,
		   &t.tm_min, &t.tm_sec, &n) != 6)
		return 0;
	s += n;
	s += *s == '.' ? strspn(s, ".0123456789") : 0;
	if (strcmp(s, "Z") && sscanf(s, "%1[+-]%2d:%2d", sign, &hours, &minutes) != 3)
		return 0;
	t.tm_year -= 1900;
	t.tm_mon--;
	return (int64_t)timegm(&t) - (*sign == '-' ? -60 : 60) * (hours * 60 + minutes);
}

/* Who it is, into r->names. The token of metadata. */
static int read_identity(struct reader *r)
{
	bool node = r->o->kind == NODES;
	int meta;

	if (!json_is(r->j, r->root, JSMN_OBJECT))
		flaw(r, -1, "it", "must be an object");
	meta = read_member(r, r->root, "metadata", JSMN_OBJECT);
	read_name(r, node ? -1 : json_get(r->j, meta, "namespace"), MAX_NAME);
	buf_printf(&r->names, "%s", r->text.len || node ? r->text.at : "default");
	buf_add(&r->names, "", 1);
	read_name(r, json_get(r->j, meta, "name"), MAX_NAME);
	if (!r->text.len)
		flaw(r, meta, meta < 0 ? "metadata.name" : "name", "is missing");
	if (!r->bad) {
		r->name = r->names.len;
		buf_add(&r->names, r->text.at, r->text.len + 1);
	}
	return meta;
}

static int read_labels(struct reader *r, int meta)
{
	int at = read_member(r, meta, "labels", JSMN_OBJECT);

	for (int i = json_first(r->j, at); i >= 0; i = json_next(r->j, at, i))
		read_typed(r, i + 1, JSMN_STRING);
	r->o->ignored = r->o->kind != NODES &&
		(json_get(r->j, at, "service.kubernetes.io/service-proxy-name") >= 0 ||
		 json_get(r->j, at, "service.kubernetes.io/headless") >= 0);
	return at;
}

static int port_by_name(const void *a, const void *b, void *texts)
{
	const struct port *p = a, *q = b;
	int c = strcmp((char *)texts + p->name, (char *)texts + q->name);

	c = c ? c : strcmp(proto_name(p->proto), proto_name(q->proto));
	return c ? c : p->name < q->name ? -1 : p->name > q->name; /* as they came */
}

static int port_by_number(const void *a, const void *b)
{
	const struct port *p = *(struct port *const *)a, *q = *(struct port *const *)b;

	if (p->proto != q->proto)
		return p->proto - q->proto;
	return p->number != q->number ? p->number - q->number : p < q ? -1 : p > q;
}

/* Of ports with the same number and protocol, all but the first by name. */
static void ports_shadow(struct port *p, uint32_t n)
{
	struct port **by = mem(NULL, n * sizeof(*by));

	for (uint32_t i = 0; i < n; i++)
		by[i] = p + i;
	qsort(by, n, sizeof(*by), port_by_number);
	for (uint32_t i = 1; i < n; i++)
		by[i]->shadowed =
			by[i]->number == by[i - 1]->number && by[i]->proto == by[i - 1]->proto;
	free(by);
}

/* The ports of a service or slice, sorted, to `out`, their names to `texts`.
 * Returns how many. Of a service's ports of one name and protocol the last
 * counts; a slice's are left out if name or number is missing. */
static uint32_t read_ports(struct reader *r, int parent, struct buf *out, struct buf *texts)
{
	bool slice = r->o->kind == SLICES;
	int at = read_member(r, parent, "ports", JSMN_ARRAY);
	size_t first = out->len;
	uint32_t n, kept = 0;
	struct port *p;

	for (int i = json_first(r->j, at); i >= 0 && !r->bad; i = json_next(r->j, at, i)) {
		struct port port = { .name = texts->len };
		int named;

		if (read_typed(r, i, JSMN_OBJECT) < 0)
			continue;
		port.proto = read_protocol(r, i);
		port.number = read_number(r, i, "port", !slice, 65535);
		named = read_name(r, json_get(r->j, i, "name"), MAX_PORTNAME);
		if (!slice && !port.number)
			flaw(r, i, "port", "is missing");
		if (slice && (named < 0 || !port.number))
			continue;
		buf_add(texts, r->text.at, r->text.len + 1);
		buf_add(out, &port, sizeof(port));
	}
	n = (out->len - first) / sizeof(*p);
	if (!n)
		return 0;
	p = (struct port *)(out->at + first);
	qsort_r(p, n, sizeof(*p), port_by_name, texts->at);
	for (uint32_t i = 0; i < n; i++)
		if (i + 1 == n || slice || p[i].proto != p[i + 1].proto ||
		    strcmp(texts->at + p[i].name, texts->at + p[i + 1].name))
			p[kept++] = p[i];
	out->len = first + kept * sizeof(*p);
	if (!slice)
		ports_shadow(p, kept);
	return kept;
}

/* clusterIPs[i] of ipFamilies[i], the first of a family; without families
 * clusterIP alone. */
static void read_cluster_ips(struct reader *r, int spec, struct spec *s, struct buf *out)
{
	int families = read_member(r, spec, "ipFamilies", JSMN_ARRAY);
	int ips = read_member(r, spec, "clusterIPs", JSMN_ARRAY);
	int family = json_first(r->j, families), ip = json_first(r->j, ips);
	bool have[2] = { false }, v4;
	struct in6_addr a;

	if (read_address(r, json_get(r->j, spec, "clusterIP"), &a) && family < 0) {
		buf_add(out, &a, sizeof(a));
		s->n_cluster++;
	}
	while (ip >= 0 || family >= 0) {
		bool there = read_address(r, ip, &a);

		read_string(r, family);
		v4 = json_eq(r->j, family, "IPv4");
		if (there && (v4 || json_eq(r->j, family, "IPv6"))) {
			if (addr_is_v4(&a) != v4)
				flaw(r, ip, "", "is not of its ipFamily");
			if (!have[v4])
				buf_add(out, &a, sizeof(a));
			s->n_cluster += !have[v4];
			have[v4] = true;
		}
		ip = ip < 0 ? -1 : json_next(r->j, ips, ip);
		family = family < 0 ? -1 : json_next(r->j, families, family);
	}
}

/* externalIPs, then the load-balancer IPs that nodes are to serve. */
static void read_external_ips(struct reader *r, int spec, struct spec *s, struct buf *out)
{
	int ips = read_member(r, spec, "externalIPs", JSMN_ARRAY);
	int lb = read_member(r, read_member(r, r->root, "status", JSMN_OBJECT), "loadBalancer",
			     JSMN_OBJECT);
	struct in6_addr a;

	for (int i = json_first(r->j, ips); i >= 0; i = json_next(r->j, ips, i))
		if (read_address(r, i, &a)) {
			buf_add(out, &a, sizeof(a));
			s->n_external++;
		}
	lb = read_member(r, lb, "ingress", JSMN_ARRAY);
	for (int i = json_first(r->j, lb); i >= 0; i = json_next(r->j, lb, i)) {
		int mode = json_get(r->j, read_typed(r, i, JSMN_OBJECT), "ipMode");

		if ((mode < 0 || read_is(r, i, "ipMode", "VIP")) &&
		    read_address(r, json_get(r->j, i, "ip"), &a)) {
			buf_add(out, &a, sizeof(a));
			s->n_lb++;
		}
	}
}

static void read_sources(struct reader *r, int spec, struct spec *s, struct buf *out)
{
	static const char space[] = " \t\n\v\f\r";
	int at = read_member(r, spec, "loadBalancerSourceRanges", JSMN_ARRAY);

	for (int i = json_first(r->j, at); i >= 0; i = json_next(r->j, at, i)) {
		struct cidr c;
		size_t from, len;

		if (read_string(r, i) < 0)
			continue;
		memset(&c, 0, sizeof(c)); /* the gaps too */
		from = strspn(r->text.at, space);
		for (len = r->text.len; len > from && strchr(space, r->text.at[len - 1]); len--)
			;
		if (!cidr_parse(r->text.at + from, len - from, &c))
			flaw(r, i, "", "is no CIDR: %.60s", r->text.at);
		addr_mask(&c.addr, c.bits);
		buf_add(out, &c, sizeof(c));
		s->n_sources++;
	}
}

static uint32_t read_affinity(struct reader *r, int spec)
{
	uint32_t seconds;
	int at;

	if (!read_is(r, spec, "sessionAffinity", "ClientIP"))
		return 0;
	at = read_member(r, spec, "sessionAffinityConfig", JSMN_OBJECT);
	at = read_member(r, at, "clientIP", JSMN_OBJECT);
	seconds = read_number(r, at, "timeoutSeconds", 1, 86400);
	return seconds ? seconds : 10800;
}

/* A block: `head` bytes of its struct, then what is in `out` and `texts`. */
static void *read_block(const void *head, size_t n, struct buf *out, struct buf *texts)
{
	char *block = mem(NULL, n + out->len + texts->len);

	memcpy(block, head, n);
	if (out->len)
		memcpy(block + n, out->at, out->len);
	if (texts->len)
		memcpy(block + n + out->len, texts->at, texts->len);
	buf_free(out);
	buf_free(texts);
	return block;
}

static void read_service(struct reader *r, const struct filter *f, int meta, int labels)
{
	int spec = read_member(r, r->root, "spec", JSMN_OBJECT);
	struct spec s = { 0 };
	struct buf out = { 0 }, texts = { 0 };

	r->o->ignored |= read_is(r, spec, "type", "ExternalName");
	r->o->ignored |= read_is(r, spec, "clusterIP", "None") || !r->text.len;
	if (r->o->ignored || r->bad)
		return;
	s.served = filter_match(f, r->names.at, r->j, labels);
	read_string(r, json_get(r->j, meta, "creationTimestamp"));
	s.created = read_timestamp(r->text.at);
	read_cluster_ips(r, spec, &s, &out);
	read_external_ips(r, spec, &s, &out);
	read_sources(r, spec, &s, &out);
	s.internal_local = read_is(r, spec, "internalTrafficPolicy", "Local");
	s.external_local = read_is(r, spec, "externalTrafficPolicy", "Local");
	s.affinity = read_affinity(r, spec);
	s.n_ports = read_ports(r, spec, &out, &texts);
	s.size = offsetof(struct spec, at) + out.len + texts.len;
	r->o->spec = read_block(&s, offsetof(struct spec, at), &out, &texts);
}

/* The hints, each with its kind before it. */
static void read_hints(struct reader *r, int hints, const char *key, char kind, struct buf *out)
{
	int at = read_member(r, hints, key, JSMN_ARRAY);

	for (int i = json_first(r->j, at); i >= 0; i = json_next(r->j, at, i)) {
		if (read_typed(r, i, JSMN_OBJECT) < 0)
			continue;
		read_name(r, json_get(r->j, i, "name"), kind == 'n' ? MAX_NAME : 0);
		buf_add(out, &kind, 1);
		buf_add(out, r->text.at, r->text.len + 1);
	}
}

/* An endpoint to `out`, unless it has no address of the slice's family. */
static void read_endpoint(struct reader *r, int at, struct slice *s, struct buf *out)
{
	int conditions = read_member(r, at, "conditions", JSMN_OBJECT);
	int hints = read_member(r, at, "hints", JSMN_OBJECT);
	int ips = read_member(r, at, "addresses", JSMN_ARRAY);
	size_t before = out->len;
	struct in6_addr a;
	char flags = (read_bool(r, conditions, "ready", true) ? ENDPOINT_READY : 0) |
		(read_bool(r, conditions, "serving", true) ? ENDPOINT_SERVING : 0) |
		(read_bool(r, conditions, "terminating", false) ? ENDPOINT_TERMINATING : 0);
	bool there = read_address(r, json_first(r->j, ips), &a) && addr_is_v4(&a) == s->v4;

	buf_add(out, &flags, 1);
	buf_add(out, a.s6_addr + (s->v4 ? 12 : 0), s->v4 ? 4 : 16);
	read_name(r, json_get(r->j, at, "nodeName"), MAX_NAME);
	buf_add(out, r->text.at, r->text.len + 1);
	read_hints(r, hints, "forZones", 'z', out);
	read_hints(r, hints, "forNodes", 'n', out);
	buf_add(out, "", 1);
	s->n_endpoints += there;
	out->len = there ? out->len : before;
}

static void read_slice(struct reader *r, int labels)
{
	struct slice s = { 0 };
	struct buf out = { 0 }, texts = { 0 }, endpoints = { 0 };
	int at;

	read_name(r, json_get(r->j, labels, "kubernetes.io/service-name"), MAX_NAME);
	buf_add(&r->names, r->text.at, r->text.len + 1);
	r->o->ignored |= !r->text.len;
	s.v4 = read_is(r, r->root, "addressType", "IPv4");
	r->o->ignored |= !s.v4 && !read_is(r, r->root, "addressType", "IPv6");
	if (r->o->ignored || r->bad)
		return;
	s.n_ports = read_ports(r, r->root, &out, &texts);
	at = read_member(r, r->root, "endpoints", JSMN_ARRAY);
	for (int i = json_first(r->j, at); i >= 0 && !r->bad; i = json_next(r->j, at, i))
		if (read_typed(r, i, JSMN_OBJECT) >= 0)
			read_endpoint(r, i, &s, &endpoints);
	s.name = texts.len;
	buf_add(&texts, r->names.at + r->name, strlen(r->names.at + r->name) + 1);
	s.texts = texts.len;
	buf_add(&texts, endpoints.at ? endpoints.at : "", endpoints.len);
	buf_free(&endpoints);
	s.size = offsetof(struct slice, at) + out.len + texts.len;
	r->o->slice = read_block(&s, offsetof(struct slice, at), &out, &texts);
}

/* The object at a token. 0, or -1 with why; either way o->name is who it is,
 * NULL if that is not known, and object_free is due. */
static int object_read(struct object *o, const struct filter *f, enum kind k, const struct json *j,
		       int at)
{
	struct reader r = { .j = j, .o = o, .root = at };
	int meta, labels = -1, level = 1;

	*o = (struct object){ .kind = k };
	meta = read_identity(&r);
	for (int up = at < 0 ? -1 : j->tok[at].parent; up >= 0; up = j->tok[up].parent)
		level += !json_is(j, up, JSMN_STRING);
	if (j->flaw)
		flaw(&r, -1, "it", "%s", j->flaw);
	else if (at >= 0 && (size_t)(j->tok[at].end - j->tok[at].start) > MAX_OBJECT)
		flaw(&r, -1, "it", "is longer than 2 MiB");
	else if (j->depth - level >= MAX_DEPTH)
		flaw(&r, -1, "it", "is nested deeper than %d levels", MAX_DEPTH);
	if (!r.bad)
		labels = read_labels(&r, meta);
	if (k == SERVICES && !o->ignored && !r.bad)
		read_service(&r, f, meta, labels);
	if (k == SLICES && !o->ignored && !r.bad)
		read_slice(&r, labels);
	if (k == NODES) {
		read_name(&r, json_get(j, labels, "topology.kubernetes.io/zone"), 0);
		buf_add(&r.names, r.text.at, r.text.len + 1);
	}
	buf_add(&r.names, "", 1);
	if (r.name) {
		o->ns = mem(NULL, r.names.len);
		memcpy(o->ns, r.names.at, r.names.len);
		o->name = o->ns + r.name;
		o->more = o->name + strlen(o->name) + 1;
	}
	buf_free(&r.names);
	buf_free(&r.text);
	return r.bad ? -1 : 0;
}
/* === model (what the cluster has) =========================================
 * Services, their slices, our node; who claims which address; who is dirty.
 * Each put and delete settles claims and VIPs at once, so what comes out
 * depends on the set of objects alone, never on their order. */
enum claim_role {
	CLAIM_ADDRESS,	/* ClusterIP, mapped address or VIP: the address, whatever the port */
	CLAIM_EXTERNAL, /* external address, port and protocol */
	CLAIM_USE,	/* external address: whom a new CLAIM_ADDRESS would concern */
};

struct claim {
	struct link link; /* by what follows `of` */
	struct service *of;
	struct in6_addr addr;
	uint16_t port;
	uint8_t proto, role;
};

#define CLAIM_KEY (offsetof(struct claim, role) + 1 - offsetof(struct claim, addr)) /* bytes */

/* By namespace and name; also where there are only slices of it yet. */
struct service {
	struct link link;
	struct service *next_dirty;
	struct spec *spec; /* NULL: no such Service, or ignored */
	struct slice *slices;
	struct claim *claims, *vip; /* an array; one, or NULL */
	void *programmed;	    /* the maps stage's */
	uint32_t n_claims, said;    /* said: a hash of the notes about it */
	bool said_sctp;
	bool seen, dirty, out; /* since the mark; in the list; model_next_dirty gave it out */
	bool gone;	       /* nothing of it is to be programmed */
	const char *name;
	char ns[]; /* and the name */
};

#define MAX_BAD 4096 /* further bad objects are said again each time */

struct model { /* all zero, then model_init */
	const struct options *opt;
	struct filter filter;
	struct {
		const char *node;
		char *zone; /* NULL: none */
	} places;	    /* ours */
	struct table services, slices, claims;
	struct service *dirty;
	bool synced[N_KINDS];
	bool node_seen;
	bool unnamed[N_KINDS]; /* since the mark came something whose name is unknown */
	bool started;  /* model_check found nothing: what comes later and overlaps is not served */
	bool repeated; /* model_put failed as it did for this object before: say it once */
	struct bad {
		uint64_t who, why;
	} * bad; /* objects of which the last news was bad, and the lines about them */
	size_t n_bad;
	size_t n_without, said_without; /* services that found the VIP range full */
};

/* 0, or -1 with why: the selector is wrong. */
static int model_init(struct model *m, const struct options *o)
{
	m->opt = o;
	m->filter.namespaces = o->namespaces;
	m->filter.n_namespaces = o->n_namespaces;
	m->places.node = o->node ? o->node : "";
	return selector_parse(o->selector, &m->filter);
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

static struct service *service_find(struct model *m, const char *ns, const char *name)
{
	uint64_t hash = name_hash(ns, name);
	struct service *s = NULL;

	while ((s = (struct service *)table_next(&m->services, (struct link *)s, hash)))
		if (!strcmp(s->ns, ns) && !strcmp(s->name, name))
			break;
	return s;
}

static struct service *service_get(struct model *m, const char *ns, const char *name)
{
	struct service *s = service_find(m, ns, name);
	size_t a = strlen(ns) + 1, b = strlen(name) + 1;

	if (s)
		return s;
	s = mem(NULL, sizeof(*s) + a + b);
	memset(s, 0, sizeof(*s));
	memcpy(s->ns, ns, a);
	s->name = memcpy(s->ns + a, name, b);
	table_add(&m->services, &s->link, name_hash(ns, name));
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

/* Older: by creation, then namespace, then name. */
static bool service_older(const struct service *a, const struct service *b)
{
	int c;

	if (a->spec->created != b->spec->created)
		return a->spec->created < b->spec->created;
	c = strcmp(a->ns, b->ns);
	return c ? c < 0 : strcmp(a->name, b->name) < 0;
}

/* The ClusterIP of a family, or NULL. */
static const struct in6_addr *spec_cluster_ip(const struct spec *s, bool v4)
{
	for (uint32_t i = 0; i < s->n_cluster; i++)
		if (addr_is_v4(&s->at[i]) == v4)
			return &s->at[i];
	return NULL;
}

/* --- claims ---------------------------------------------------------------- */
static uint64_t claim_hash(const struct claim *c)
{
	return hash64(0, &c->addr, CLAIM_KEY);
}

/* The next claim to the same, behind `at`; the first if that is NULL. */
static struct claim *claim_next(const struct model *m, const struct claim *like, struct claim *at)
{
	uint64_t hash = claim_hash(like);

	while ((at = (struct claim *)table_next(&m->claims, (struct link *)at, hash)))
		if (!memcmp(&at->addr, &like->addr, CLAIM_KEY))
			break;
	return at;
}

static struct claim *claim_first(const struct model *m, enum claim_role role,
				 const struct in6_addr *addr, uint16_t port, uint8_t proto)
{
	struct claim like = { .addr = *addr, .port = port, .proto = proto, .role = role };

	return claim_next(m, &like, NULL);
}

/* Whoever shares what is claimed may have to be resolved anew. */
static void claim_changed(struct model *m, const struct claim *c)
{
	for (struct claim *o = claim_next(m, c, NULL); o && c->role != CLAIM_USE;
	     o = claim_next(m, c, o))
		model_dirty(m, o->of);
	if (c->role == CLAIM_ADDRESS)
		for (struct claim *o = claim_first(m, CLAIM_USE, &c->addr, 0, 0); o;
		     o = claim_next(m, o, o))
			model_dirty(m, o->of);
}

static void claim_add(struct model *m, struct claim *c)
{
	table_add(&m->claims, &c->link, claim_hash(c));
	claim_changed(m, c);
}

static void claim_remove(struct model *m, struct claim *c)
{
	claim_changed(m, c);
	table_remove(&m->claims, &c->link);
}

/* In --vip-range or a --map's FROM: no address for a service of its own. The
 * range's text, or NULL. */
static const char *addr_reserved(const struct model *m, const struct in6_addr *a)
{
	static char text[INET6_ADDRSTRLEN + 20];

	if (m->opt->has_vip_range && cidr_has(&m->opt->vip_range, a)) {
		strcpy(text, "--vip-range ");
		cidr_text(&m->opt->vip_range, text + 12);
		return text;
	}
	for (int i = 0; i < m->opt->n_maps; i++)
		if (cidr_has(&m->opt->maps[i].from, a)) {
			strcpy(text, "--map ");
			cidr_text(&m->opt->maps[i].from, text + 6);
			return text;
		}
	return NULL;
}

/* The reserved addresses are found before anything is programmed and end the
 * start; afterwards they are left out. */
static bool addr_refused(const struct model *m, const struct service *s, const struct in6_addr *a)
{
	return m->started && s->spec->served && addr_reserved(m, a);
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

static void claims_build(struct model *m, struct service *s)
{
	struct buf out = { 0 };
	struct spec *spec = s->spec;
	struct claim c = { .of = s, .role = CLAIM_ADDRESS };
	const struct in6_addr *ip = spec->at, *end = ip + spec->n_cluster;

	for (; ip < end; ip++) {
		c.addr = *ip;
		if (!addr_refused(m, s, ip))
			buf_add(&out, &c, sizeof(c));
		for (int i = 0; i < m->opt->n_maps; i++)
			if (cidr_has(&m->opt->maps[i].to, ip)) {
				c.addr = addr_mapped(&m->opt->maps[i], ip);
				buf_add(&out, &c, sizeof(c));
			}
	}
	for (end += spec->n_external + spec->n_lb; ip < end && spec->served; ip++) {
		if (!spec_cluster_ip(spec, addr_is_v4(ip)) || addr_refused(m, s, ip))
			continue;
		c = (struct claim){ .of = s, .addr = *ip, .role = CLAIM_USE };
		buf_add(&out, &c, sizeof(c));
		c.role = CLAIM_EXTERNAL;
		for (uint32_t i = 0; i < spec->n_ports; i++) {
			c.port = spec_ports(spec)[i].number;
			c.proto = spec_ports(spec)[i].proto;
			buf_add(&out, &c, sizeof(c));
		}
	}
	s->n_claims = out.len / sizeof(c);
	s->claims = out.len ? mem(out.at, out.len) : NULL;
	for (uint32_t i = 0; i < s->n_claims; i++)
		claim_add(m, &s->claims[i]);
}

/* --- VIPs -------------------------------------------------------------------
 * Slots of --vip-range, each with an address. A service's home is a hash of its
 * name; if an older one lives there it goes on to the next slot, and so on. The
 * outcome is the one of dealing them out by age: whoever comes puts younger
 * ones out, and a slot that falls free goes to the oldest that prefers it. */
static uint64_t vip_room(const struct model *m, uint64_t *first)
{
	const struct cidr *range = &m->opt->vip_range;
	int width = 128 - range->bits;

	*first = addr_is_v4(&range->addr) &&
		width >= 2; /* not the network's, not the broadcast address */
	return ((uint64_t)1 << (width < 62 ? width : 62)) - *first * 2;
}

/* The low half of an address as a number; a slot's is its distance in it. */
static uint64_t addr_low(const struct in6_addr *a)
{
	uint64_t v = 0;

	for (int i = 8; i < 16; i++)
		v = v << 8 | a->s6_addr[i];
	return v;
}

static struct service *vip_holder(const struct model *m, uint64_t slot, struct in6_addr *a)
{
	uint64_t first, low;

	vip_room(m, &first);
	*a = m->opt->vip_range.addr;
	low = addr_low(a) + first + slot;
	for (int i = 15; i >= 8; i--, low >>= 8)
		a->s6_addr[i] = low;
	for (struct claim *c = claim_first(m, CLAIM_ADDRESS, a, 0, 0); c; c = claim_next(m, c, c))
		if (c->of->vip == c)
			return c->of;
	return NULL;
}

/* How many slots from the home of `s` on. */
static uint64_t vip_distance(const struct model *m, const struct service *s, uint64_t slot)
{
	uint64_t first, room = vip_room(m, &first), home = name_hash(s->ns, s->name) % room;

	return (slot + room - home) % room;
}

static void vip_take(struct model *m, struct service *s, uint64_t slot)
{
	s->vip = mem(NULL, sizeof(*s->vip));
	*s->vip = (struct claim){ .of = NULL, .role = CLAIM_ADDRESS };
	vip_holder(m, slot, &s->vip->addr);
	s->vip->of = s;
	claim_add(m, s->vip);
	model_dirty(m, s);
}

/* Returns the slot that falls free. */
static uint64_t vip_leave(struct model *m, struct service *s)
{
	uint64_t first, low = addr_low(&s->vip->addr) - addr_low(&m->opt->vip_range.addr);

	vip_room(m, &first);
	claim_remove(m, s->vip);
	free(s->vip);
	s->vip = NULL;
	model_dirty(m, s);
	return low - first;
}

static void vip_place(struct model *m, struct service *s)
{
	uint64_t first, room = vip_room(m, &first), slot = name_hash(s->ns, s->name) % room;
	struct in6_addr a;

	do {
		struct service *o = vip_holder(m, slot, &a);

		if (!o || service_older(s, o)) {
			if (o)
				vip_leave(m, o);
			vip_take(m, s, slot);
			if (!o)
				return;
			s = o;
		}
		slot = (slot + 1) % room;
	} while (vip_distance(m, s, slot));
	m->n_without++;
}

static bool vip_wanted(const struct model *m, const struct spec *s)
{
	return s && m->opt->has_vip_range &&
		spec_cluster_ip(s, addr_is_v4(&m->opt->vip_range.addr));
}

static void vip_release(struct model *m, struct service *s)
{
	uint64_t first, room = vip_room(m, &first), start, hole;
	struct service *o, *best = NULL;
	struct in6_addr a;

	if (!s->vip) {
		m->n_without--;
		return;
	}
	start = hole = vip_leave(m, s);
	/* who lives between a hole and the first who would rather be in it is older
	 * than that one: so he is the oldest who would, and one round is enough */
	for (uint64_t at = (start + 1) % room; at != start && (o = vip_holder(m, at, &a));
	     at = (at + 1) % room)
		if (vip_distance(m, o, hole) < vip_distance(m, o, at)) {
			vip_leave(m, o);
			vip_take(m, o, hole);
			hole = at;
		}
	if (!m->n_without)
		return;
	TABLE_EACH (&m->services, l) {
		o = (struct service *)l;
		if (o != s && !o->vip && vip_wanted(m, o->spec) &&
		    (!best || service_older(o, best)))
			best = o;
	}
	vip_take(m, best, hole);
	m->n_without--;
}

/* --- putting and deleting --------------------------------------------------- */
static void service_change(struct model *m, struct service *s, struct spec *new)
{
	bool had = vip_wanted(m, s->spec);
	bool kept = had && vip_wanted(m, new) && new->created == s->spec->created;

	if (had && !kept)
		vip_release(m, s);
	for (uint32_t i = 0; i < s->n_claims; i++)
		claim_remove(m, &s->claims[i]);
	free(s->claims);
	free(s->spec);
	s->spec = new;
	s->claims = NULL;
	s->n_claims = 0;
	if (new)
		claims_build(m, s);
	if (vip_wanted(m, new) && !kept)
		vip_place(m, s);
	model_dirty(m, s);
}

static void service_put(struct model *m, struct object *o)
{
	struct service *s =
		o->spec ? service_get(m, o->ns, o->name) : service_find(m, o->ns, o->name);

	if (!s)
		return;
	s->seen = true;
	if (!s->spec && !o->spec)
		return;
	if (s->spec && o->spec && s->spec->size == o->spec->size &&
	    !memcmp(s->spec, o->spec, o->spec->size))
		return;
	service_change(m, s, o->spec);
	o->spec = NULL;
}

static struct slice *slice_find(struct model *m, const char *ns, const char *name)
{
	uint64_t hash = name_hash(ns, name);
	struct slice *s = NULL;

	while ((s = (struct slice *)table_next(&m->slices, (struct link *)s, hash)))
		if (!strcmp(s->of->ns, ns) && !strcmp(slice_text(s, s->name), name))
			break;
	return s;
}

static void slice_remove(struct model *m, struct slice *s)
{
	struct slice **at = &s->of->slices;

	while (*at != s)
		at = &(*at)->sibling;
	*at = s->sibling;
	table_remove(&m->slices, &s->link);
	model_dirty(m, s->of);
	free(s);
}

static void slice_put(struct model *m, struct object *o)
{
	struct slice *old = slice_find(m, o->ns, o->name), *new = o->slice;
	size_t from = offsetof(struct slice, size);

	if (old && new && !strcmp(old->of->name, o->more) && old->size == new->size &&
	    !memcmp((char *)old + from, (char *)new + from, new->size - from)) {
		old->seen = true;
		return;
	}
	if (old)
		slice_remove(m, old);
	if (!new)
		return;
	o->slice = NULL;
	new->of = service_get(m, o->ns, o->more);
	new->seen = true;
	new->sibling = new->of->slices;
	new->of->slices = new;
	table_add(&m->slices, &new->link, name_hash(o->ns, o->name));
	model_dirty(m, new->of);
}

/* Our node's zone; "": it has none, or is not there. */
static void model_zone(struct model *m, const char *zone)
{
	if (!strcmp(zone, m->places.zone ? m->places.zone : ""))
		return;
	free(m->places.zone);
	m->places.zone = strdup(zone);
	TABLE_EACH (&m->services, l)
		model_dirty(m, (struct service *)l);
}

/* Takes what object_read made; object_free is due afterwards. */
static void model_store(struct model *m, struct object *o)
{
	if (o->kind == SERVICES)
		service_put(m, o);
	else if (o->kind == SLICES)
		slice_put(m, o);
	else if (!strcmp(o->name, m->places.node)) {
		m->node_seen = true;
		model_zone(m, o->more);
	}
}

/* The last news of an object was good: `why` is NULL; or bad, then its last good
 * state stays, through a relist too. */
static void bad_put(struct model *m, const struct object *o, const char *why)
{
	struct service *service =
		o->name && o->kind == SERVICES ? service_find(m, o->ns, o->name) : NULL;
	struct slice *slice = o->name && o->kind == SLICES ? slice_find(m, o->ns, o->name) : NULL;
	struct bad new = { .why = why ? hash64(0, why, strlen(why)) : 0 }, *old = m->bad,
		   *end = old + m->n_bad;

	new.who = o->name ? hash64(o->kind, o->ns, o->more - o->ns) : new.why;
	while (old < end && old->who != new.who)
		old++;
	m->repeated = old < end && old->why == new.why;
	if (old < end)
		*old = why ? new : m->bad[--m->n_bad];
	if (!why)
		return;
	if (old == end && m->n_bad < MAX_BAD) {
		m->bad = mem(m->bad, (m->n_bad + 1) * sizeof(new));
		m->bad[m->n_bad++] = new;
	}
	if (service)
		service->seen = true;
	if (slice)
		slice->seen = true;
	m->node_seen |= o->kind == NODES && o->name && !strcmp(o->name, m->places.node);
	m->unnamed[o->kind] |= !o->name;
}

/* 0; or -1 with why, naming kind, namespace/name and field: the object is bad,
 * its last good state stays. A text that json_parse refused comes here too, if
 * its stream is sound: what stands of it names it. */
static int model_put(struct model *m, enum kind k, const struct json *j, int at)
{
	struct object o;
	int got = object_read(&o, &m->filter, k, j, at);

	if (got || m->n_bad)
		bad_put(m, &o, got ? why : NULL);
	if (!got)
		model_store(m, &o);
	object_free(&o);
	return got;
}

static void model_delete(struct model *m, enum kind k, const struct json *j, int at)
{
	struct object o;

	object_read(&o, &m->filter, k, j, at);
	bad_put(m, &o, NULL);
	free(o.spec);
	free(o.slice);
	o.spec = NULL; /* it is as if it were ignored from now on */
	o.slice = NULL;
	if (o.name && k == NODES)
		*o.more = 0;
	if (o.name)
		model_store(m, &o);
	object_free(&o);
}

/* A list begins. */
static void model_mark(struct model *m, enum kind k)
{
	TABLE_EACH (&m->services, l)
		((struct service *)l)->seen &= k != SERVICES;
	TABLE_EACH (&m->slices, l)
		((struct slice *)l)->seen &= k != SLICES;
	m->node_seen &= k != NODES;
	m->unnamed[k] = false;
}

/* It is complete: what it did not bring goes, unless something in it could not
 * be named, which may be any of those. */
static void model_sweep(struct model *m, enum kind k)
{
	m->synced[k] = true;
	if (m->unnamed[k])
		return;
	if (k == SERVICES)
		TABLE_EACH (&m->services, l)
			if (((struct service *)l)->spec && !((struct service *)l)->seen)
				service_change(m, (struct service *)l, NULL);
	if (k == SLICES)
		TABLE_EACH (&m->slices, l)
			if (!((struct slice *)l)->seen)
				slice_remove(m, (struct slice *)l);
	if (k == NODES && !m->node_seen)
		model_zone(m, "");
}

static int service_by_name(const void *a, const void *b)
{
	const struct service *s = *(struct service *const *)a, *o = *(struct service *const *)b;
	int c = strcmp(s->ns, o->ns);

	return c ? c : strcmp(s->name, o->name);
}

/* The services that are served, by namespace and name; to be freed. */
static struct service **model_sorted(struct model *m, size_t *n)
{
	struct service **all = mem(NULL, m->services.n * sizeof(*all));

	*n = 0;
	TABLE_EACH (&m->services, l)
		if (((struct service *)l)->spec && ((struct service *)l)->spec->served)
			all[(*n)++] = (struct service *)l;
	qsort(all, *n, sizeof(*all), service_by_name);
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
			const struct cidr *a = &o->maps[i].from,
					  *b = k < 0 ? &o->vip_range : &o->maps[k].from;

			if (cidr_overlap(a, b) &&
			    (k < 0 || memcmp(&o->maps[i], &o->maps[k], sizeof(*o->maps))))
				return fail(
					"--map %s and --%s %s overlap: choose ranges of their own",
					cidr_text(a, text), k < 0 ? "vip-range" : "map",
					cidr_text(b, other));
		}
	all = model_sorted(m, &n);
	for (size_t i = 0; i < n && !got; i++) {
		struct spec *s = all[i]->spec;

		for (uint32_t k = 0; k < s->n_cluster + s->n_external + s->n_lb && !got; k++)
			if (spec_cluster_ip(s, addr_is_v4(&s->at[k])) &&
			    addr_reserved(m, &s->at[k]))
				got = fail("%s contains %s, an address of Service %s/%s: choose "
					   "another range",
					   addr_reserved(m, &s->at[k]), addr_text(&s->at[k], text),
					   all[i]->ns, all[i]->name);
	}
	free(all);
	m->started = !got;
	return got;
}

/* Call before model_next_dirty: says what concerns them all. */
static void model_settle(struct model *m)
{
	char text[INET6_ADDRSTRLEN + 4];

	if (m->n_without && m->n_without != m->said_without)
		note("--vip-range %s is full: the %zu youngest services have no address in it",
		     cidr_text(&m->opt->vip_range, text), m->n_without);
	m->said_without = m->n_without;
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
 * kube-proxy's rules, one function each. Everything returned lives in one
 * arena that the next call uses again. */
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
	struct backend *backends;   /* likewise */
	struct cidr *sources;	    /* of scope TL_LOADBALANCER */
	struct backend *serving;    /* a UDP flow to one of these is not flushed (rule 17) */
	int n_frontends, n_backends, n_sources, n_serving;
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
	/* inside: arrays of entries begin at offsets in `arena` until all is there */
	struct buf arena, list, candidates;
	struct buf lost;       /* notes about frontends that are not served, one a line */
	const char *sctp_port; /* a port of which endpoints were left out, or NULL */
};

/* The endpoint at `at` in a slice; the next one's place. */
static const char *candidate_read(const struct model *m, const struct slice *s, const char *at,
				  struct candidate *c)
{
	const char *node = m->places.node, *zone = m->places.zone ? m->places.zone : "";

	c->conditions = *at++;
	c->backend.addr = (struct in6_addr){ .s6_addr = { [10] = 0xff, 0xff } };
	memcpy(c->backend.addr.s6_addr + (s->v4 ? 12 : 0), at, s->v4 ? 4 : 16);
	at += s->v4 ? 4 : 16;
	c->backend.node = at;
	c->backend.local = *node && !strcmp(at, node);
	c->place = c->backend.local ? PLACE_LOCAL : 0;
	for (at += strlen(at) + 1; *at; at += strlen(at) + 1)
		if (*at == 'n')
			c->place |= PLACE_NODE_HINTS |
				(*node && !strcmp(at + 1, node) ? PLACE_OUR_NODE : 0);
		else
			c->place |= PLACE_ZONE_HINTS |
				(*zone && !strcmp(at + 1, zone) ? PLACE_OUR_ZONE : 0);
	return at + 1;
}

static int candidate_order(const void *x, const void *y)
{
	const struct candidate *a = x, *b = y;
	int c = memcmp(&a->backend.addr, &b->backend.addr, sizeof(a->backend.addr));
	int flips[] = { ENDPOINT_TERMINATING, ENDPOINT_READY, ENDPOINT_SERVING };

	c = c ? c : a->backend.port - b->backend.port;
	for (int i = 0; i < 3 && !c; i++) {
		c = !(a->conditions & flips[i]) - !(b->conditions & flips[i]);
		c = i ? c : -c; /* not terminating, then ready, then serving */
	}
	c = c ? c : strcmp(a->slice, b->slice);
	return c ? c : a->index < b->index ? -1 : a->index > b->index;
}

/* Rules 3 to 6: the endpoints of one port in one family, sorted, unique. */
static int resolve_candidates(const struct model *m, struct service *s, const struct port *p,
			      bool v4, struct resolved *r)
{
	const char *name = spec_port_name(s->spec, p);
	struct buf *out = &r->candidates;
	struct candidate *all;
	const char *at;
	int n, kept = 0;

	out->len = 0;
	for (struct slice *sl = s->slices; sl; sl = sl->sibling) {
		if (sl->v4 != v4)
			continue;
		for (uint32_t i = 0; i < sl->n_ports; i++) {
			const struct port *q = &slice_ports(sl)[i];

			if (q->proto != p->proto || strcmp(slice_text(sl, q->name), name))
				continue;
			if (q->proto == IPPROTO_SCTP && q->number != p->number) {
				r->sctp_port = sl->n_endpoints ? name : r->sctp_port;
				continue;
			}
			at = slice_text(sl, sl->texts);
			for (uint32_t k = 0; k < sl->n_endpoints; k++) {
				struct candidate c = { .slice = slice_text(sl, sl->name),
						       .index = k };

				c.backend.port = q->number;
				at = candidate_read(m, sl, at, &c);
				buf_add(out, &c, sizeof(c));
			}
		}
	}
	all = (struct candidate *)out->at;
	n = out->len / sizeof(*all);
	if (n)
		qsort(all, n, sizeof(*all), candidate_order);
	for (int i = 0; i < n; i++)
		if (!i || memcmp(&all[i].backend.addr, &all[kept - 1].backend.addr, 16) ||
		    all[i].backend.port != all[kept - 1].backend.port)
			all[kept++] = all[i];
	return kept;
}

/* Rule 9: which place flag a ready endpoint must have; 0: none, all serve. */
static int resolve_topology(const struct candidate *c, int n)
{
	int all = PLACE_NODE_HINTS | PLACE_ZONE_HINTS, any = 0;

	for (int i = 0; i < n; i++)
		if (c[i].conditions & ENDPOINT_READY) {
			all &= c[i].place;
			any |= c[i].place;
		}
	if (all & PLACE_NODE_HINTS && any & PLACE_OUR_NODE)
		return PLACE_OUR_NODE;
	return all & PLACE_ZONE_HINTS && any & PLACE_OUR_ZONE ? PLACE_OUR_ZONE : 0;
}

static bool candidate_fallback(const struct candidate *c)
{
	return c->conditions & ENDPOINT_SERVING && c->conditions & ENDPOINT_TERMINATING;
}

/* Room in the arena, aligned; the offset. */
static size_t resolved_begin(struct resolved *r)
{
	static const char zero[8];

	buf_add(&r->arena, zero, -r->arena.len & 7);
	return r->arena.len;
}

/* Rules 7 and 8: the backends under a policy, to the arena; how many. */
static int resolve_backends(struct resolved *r, int n, bool local, bool *elsewhere)
{
	const struct candidate *c = (struct candidate *)r->candidates.at;
	int place = local ? PLACE_LOCAL : resolve_topology(c, n), found = 0;

	*elsewhere = false;
	for (int i = 0; i < n; i++) {
		if (c[i].conditions & ENDPOINT_READY && (c[i].place & place) == place) {
			buf_add(&r->arena, &c[i].backend, sizeof(c[i].backend));
			found++;
		}
		*elsewhere |= !(c[i].place & PLACE_LOCAL) &&
			(c[i].conditions & ENDPOINT_READY || candidate_fallback(&c[i]));
	}
	if (found)
		return found;
	for (int i = 0; i < n; i++)
		if (candidate_fallback(&c[i]) && (!local || c[i].place & PLACE_LOCAL)) {
			buf_add(&r->arena, &c[i].backend, sizeof(c[i].backend));
			found++;
		}
	return found;
}

/* Who has a frontend instead of this service; itself: as another frontend;
 * NULL: nobody. */
static struct service *resolve_owner(struct model *m, struct service *s, const struct in6_addr *a,
				     const struct port *p, enum tl_scope scope)
{
	struct service *owner = p->shadowed ? s : NULL;
	struct claim *c;

	for (c = claim_first(m, CLAIM_ADDRESS, a, 0, 0); c && !owner; c = claim_next(m, c, c)) {
		if (scope != TL_INTERNAL)
			owner = c->of;
		else if (c->of != s && c->of->spec->served && service_older(c->of, s))
			for (uint32_t i = 0; i < c->of->spec->n_ports && !owner; i++) {
				struct port *q = &spec_ports(c->of->spec)[i];

				owner = q->number == p->number && q->proto == p->proto ? c->of :
											 NULL;
			}
	}
	if (scope != TL_INTERNAL && !owner)
		for (c = claim_first(m, CLAIM_EXTERNAL, a, p->number, p->proto); c && !owner;
		     c = claim_next(m, c, c))
			owner = c->of != s && service_older(c->of, s) ? c->of : NULL;
	return owner;
}

/* Adds a frontend to the arena, unless it is not to be served. */
static void resolve_frontend(struct model *m, struct service *s, const struct in6_addr *a,
			     const struct port *p, enum tl_scope scope, struct resolved *r)
{
	struct service *owner = resolve_owner(m, s, a, p, scope);
	struct frontend f = { .addr = *a, .port = p->number };
	char text[INET6_ADDRSTRLEN];

	if (scope != TL_INTERNAL && addr_refused(m, s, a))
		buf_printf(&r->lost, "%s is in %s\n", addr_text(a, text), addr_reserved(m, a));
	else if (owner && owner != s)
		buf_printf(&r->lost, "%s port %u/%s belongs to Service %s/%s\n", addr_text(a, text),
			   p->number, proto_name(p->proto), owner->ns, owner->name);
	else if (!owner)
		buf_add(&r->arena, &f, sizeof(f));
}

static bool spec_restricted(struct spec *s, bool v4)
{
	for (uint32_t i = 0; i < s->n_sources; i++)
		if (addr_is_v4(&spec_sources(s)[i].addr) == v4)
			return true;
	return false;
}

/* The addresses of a scope and family: ClusterIP, mapped, VIP; or external ones. */
static void resolve_frontends(struct model *m, struct service *s, const struct port *p, bool v4,
			      enum tl_scope scope, struct resolved *r)
{
	struct spec *spec = s->spec;
	const struct in6_addr *ip = spec->at + spec->n_cluster, *lb = ip + spec->n_external;
	const struct in6_addr *end = lb + spec->n_lb;
	bool restricted = spec_restricted(spec, v4);
	char text[INET6_ADDRSTRLEN];

	if (scope == TL_INTERNAL) {
		const struct in6_addr *cluster = spec_cluster_ip(spec, v4);

		for (uint32_t i = 0; i < s->n_claims; i++)
			if (s->claims[i].role == CLAIM_ADDRESS &&
			    addr_is_v4(&s->claims[i].addr) == v4)
				resolve_frontend(m, s, &s->claims[i].addr, p, scope, r);
		if (s->vip && addr_is_v4(&s->vip->addr) == v4)
			resolve_frontend(m, s, &s->vip->addr, p, scope, r);
		if (addr_refused(m, s, cluster))
			buf_printf(&r->lost, "%s is in %s\n", addr_text(cluster, text),
				   addr_reserved(m, cluster));
		return;
	}
	for (const struct in6_addr *a = ip; a < end; a++) {
		bool limited = false;

		for (const struct in6_addr *o = lb; o < end && restricted; o++)
			limited |= !memcmp(a, o, sizeof(*a));
		if (addr_is_v4(a) == v4 && limited == (scope == TL_LOADBALANCER))
			resolve_frontend(m, s, a, p, scope, r);
	}
}

static int addr_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct in6_addr));
}

static int cidr_order(const void *a, const void *b)
{
	int c = memcmp(a, b, sizeof(struct in6_addr));

	return c ? c : ((const struct cidr *)a)->bits - ((const struct cidr *)b)->bits;
}

/* Sorts what was added to the arena from `at` on, each once; how many. */
static int resolved_unique(struct resolved *r, size_t at, size_t size,
			   int (*order)(const void *, const void *))
{
	int n = (r->arena.len - at) / size, kept = 0;
	char *p = r->arena.at + at;

	if (n)
		qsort(p, n, size, order);
	for (int i = 0; i < n; i++)
		if (!i || order(p + i * size, p + (kept - 1) * size))
			memmove(p + kept++ * size, p + i * size, size);
	r->arena.len = at + kept * size;
	return kept;
}

static void resolve_entry(struct model *m, struct service *s, const struct port *p, bool v4,
			  enum tl_scope scope, int candidates, struct resolved *r)
{
	struct entry e = { .ns = s->ns,
			   .name = s->name,
			   .port = spec_port_name(s->spec, p),
			   .proto = p->proto,
			   .v4 = v4,
			   .scope = scope,
			   .affinity = s->spec->affinity };
	const struct candidate *c = (struct candidate *)r->candidates.at;
	bool local = scope == TL_INTERNAL ? s->spec->internal_local : s->spec->external_local;
	size_t at = resolved_begin(r);

	resolve_frontends(m, s, p, v4, scope, r);
	e.frontends = (void *)at;
	e.n_frontends = resolved_unique(r, at, sizeof(*e.frontends), addr_order);
	if (!e.n_frontends && scope != TL_INTERNAL)
		return;
	e.backends = (void *)resolved_begin(r);
	e.n_backends = resolve_backends(r, candidates, local, &e.drop_if_empty);
	e.drop_if_empty &= local;
	e.serving = (void *)resolved_begin(r);
	for (int i = 0; i < candidates; i++)
		if (c[i].conditions &
		    (ENDPOINT_SERVING |
		     ENDPOINT_READY)) { /* ready alone: publishNotReadyAddresses */
			buf_add(&r->arena, &c[i].backend, sizeof(*e.serving));
			e.n_serving++;
		}
	at = resolved_begin(r);
	e.sources = (void *)at;
	for (uint32_t i = 0; i < s->spec->n_sources && scope == TL_LOADBALANCER; i++)
		if (addr_is_v4(&spec_sources(s->spec)[i].addr) == v4)
			buf_add(&r->arena, &spec_sources(s->spec)[i], sizeof(*e.sources));
	e.n_sources = resolved_unique(r, at, sizeof(*e.sources), cidr_order);
	buf_add(&r->list, &e, sizeof(e));
}

/* Says what is not as the service asks for, unless it was said before. */
static void resolve_notes(struct service *s, const struct resolved *r)
{
	uint32_t said = r->lost.len ? hash64(1, r->lost.at, r->lost.len) : 0;

	if (said && said != s->said) {
		size_t first = strcspn(r->lost.at, "\n"), n = 0;

		for (const char *c = r->lost.at; *c; c++)
			n += *c == '\n';
		note("Service %s/%s: not served: %.*s%s", s->ns, s->name, (int)first, r->lost.at,
		     n > 1 ? ", and more" : "");
	}
	s->said = said;
	if (r->sctp_port && !s->said_sctp)
		note("Service %s/%s: port \"%s\": SCTP endpoints with another port number are left "
		     "out",
		     s->ns, s->name, r->sctp_port);
	s->said_sctp = r->sctp_port;
}

/* The entries of a service, sorted as CONTRACT says. */
static void resolve_service(struct model *m, struct service *s, struct resolved *r)
{
	char *base;

	r->arena.len = r->list.len = r->lost.len = 0;
	r->sctp_port = NULL;
	for (uint32_t i = 0; s->spec && s->spec->served && i < s->spec->n_ports; i++)
		for (int v4 = 1; v4 >= 0; v4--) {
			const struct port *p = &spec_ports(s->spec)[i];
			int n;

			if (!spec_cluster_ip(s->spec, v4))
				continue;
			n = resolve_candidates(m, s, p, v4, r);
			resolve_entry(m, s, p, v4, TL_INTERNAL, n, r);
			resolve_entry(m, s, p, v4, TL_EXTERNAL, n, r);
			if (spec_restricted(s->spec, v4))
				resolve_entry(m, s, p, v4, TL_LOADBALANCER, n, r);
		}
	resolve_notes(s, r);
	r->entries = (struct entry *)r->list.at;
	r->n = r->list.len / sizeof(*r->entries);
	base = r->arena.at;
	for (struct entry *e = r->entries; e < r->entries + r->n; e++) {
		e->frontends = (void *)(base + (size_t)e->frontends);
		e->backends = (void *)(base + (size_t)e->backends);
		e->serving = (void *)(base + (size_t)e->serving);
		e->sources = (void *)(base + (size_t)e->sources);
	}
}

static void resolved_free(struct resolved *r)
{
	buf_free(&r->arena);
	buf_free(&r->list);
	buf_free(&r->candidates);
	buf_free(&r->lost);
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

/* ADDR:PORT or [ADDR]:PORT */
static void print_socket(struct buf *out, const struct in6_addr *a, uint16_t port)
{
	char text[INET6_ADDRSTRLEN];

	buf_printf(out, addr_is_v4(a) ? "%s:%u" : "[%s]:%u", addr_text(a, text), port);
}

static const char *scope_name(enum tl_scope scope)
{
	return scope == TL_INTERNAL  ? "internal" :
		scope == TL_EXTERNAL ? "external" :
				       "load-balancer";
}

static void print_entry_json(struct buf *out, const struct entry *e)
{
	char text[INET6_ADDRSTRLEN + 4];

	buf_printf(out, "{\"namespace\":");
	print_string(out, e->ns);
	buf_printf(out, ",\"name\":");
	print_string(out, e->name);
	buf_printf(out, ",\"port\":");
	print_string(out, e->port);
	buf_printf(out,
		   ",\"protocol\":\"%s\",\"family\":\"IPv%d\",\"scope\":\"%s\",\"frontends\":[",
		   proto_name(e->proto), e->v4 ? 4 : 6, scope_name(e->scope));
	for (int i = 0; i < e->n_frontends; i++) {
		buf_printf(out, "%s\"", i ? "," : "");
		print_socket(out, &e->frontends[i].addr, e->frontends[i].port);
		buf_printf(out, "\"");
	}
	buf_printf(out, "],\"backends\":[");
	for (int i = 0; i < e->n_backends; i++) {
		const struct backend *b = &e->backends[i];

		buf_printf(out, "%s{\"address\":\"", i ? "," : "");
		print_socket(out, &b->addr, b->port);
		buf_printf(out, "\",\"node\":");
		print_string(out, b->node);
		buf_printf(out, ",\"local\":%s}", b->local ? "true" : "false");
	}
	buf_printf(out, "]");
	for (int i = 0; i < e->n_sources; i++)
		buf_printf(out, "%s\"%s\"%s", i ? "," : ",\"sources\":[",
			   cidr_text(&e->sources[i], text), i + 1 < e->n_sources ? "" : "]");
	buf_printf(out, ",\"empty\":\"%s\",\"affinity_seconds\":%" PRIu32 "}",
		   e->drop_if_empty ? "drop" : "reject", e->affinity);
}

/* Objects with commas between them, one a line; `first`: none were before. */
static void print_entries_json(struct buf *out, const struct entry *e, int n, bool first)
{
	for (int i = 0; i < n; i++) {
		buf_printf(out, first && !i ? "\n " : ",\n ");
		print_entry_json(out, &e[i]);
	}
}

/* For people, as `wg show`. */
static void print_entries_text(struct buf *out, const struct entry *e, int n)
{
	char text[INET6_ADDRSTRLEN + 4];

	for (; n--; e++) {
		buf_printf(out, "\nservice: %s/%s%s%s %s %s\n  frontends: ", e->ns, e->name,
			   *e->port ? " " : "", e->port, proto_name(e->proto),
			   scope_name(e->scope));
		for (int i = 0; i < e->n_frontends; i++) {
			buf_printf(out, "%s", i ? ", " : "");
			print_socket(out, &e->frontends[i].addr, e->frontends[i].port);
		}
		buf_printf(out, "%s\n", e->n_frontends ? "" : "(none)");
		for (int i = 0; i < e->n_sources; i++)
			buf_printf(out, "%s%s%s",
				   i ? ", " : "  allowed from: ", cidr_text(&e->sources[i], text),
				   i + 1 < e->n_sources ? "" : "\n");
		for (int i = 0; i < e->n_backends; i++) {
			buf_printf(out, i ? "\n            " : "  backends: ");
			print_socket(out, &e->backends[i].addr, e->backends[i].port);
			if (*e->backends[i].node)
				buf_printf(out, " on %s%s", e->backends[i].node,
					   e->backends[i].local ? " (here)" : "");
		}
		if (!e->n_backends)
			buf_printf(out, "  backends: (none), new flows are %s",
				   e->drop_if_empty ? "dropped" : "rejected");
		buf_printf(out, "\n");
		if (e->affinity)
			buf_printf(out, "  affinity: %" PRIu32 " seconds\n", e->affinity);
	}
}

/* What --dry-run prints. */
static void print_dry_run(struct buf *out, struct model *m, bool json)
{
	struct resolved r = { 0 };
	const char *zone = m->places.zone ? m->places.zone : "";
	struct service **all;
	bool first = true;
	size_t n;

	if (json) {
		buf_printf(out, "{\"node\":");
		print_string(out, m->places.node);
		buf_printf(out, ",\"zone\":");
		print_string(out, zone);
		buf_printf(out, ",\"services\":[");
	} else {
		buf_printf(out, "node: %s\nzone: %s\n", m->places.node, *zone ? zone : "(none)");
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
	if (json)
		buf_printf(out, "]}\n");
	free(all);
	resolved_free(&r);
}
/* === --from ================================================================
 * Objects from a file, read once from its beginning to its end, so that it may
 * be a pipe. Nothing reaches the model before all of it is found good. */
struct from {
	struct model *m;
	struct split split;
	struct json head, item;
	struct object *got; /* the good ones, in their order */
	size_t n, cap;
	size_t n_seen;		/* objects and items so far, to name one by its place */
	size_t before;		/* how many of `got` stood before the list at hand */
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
	if (f->n == f->cap) {
		f->cap = f->cap ? f->cap * 2 : 64;
		f->got = mem(f->got, f->cap * sizeof(*f->got));
	}
	return object_read(&f->got[f->n++], &f->m->filter, k, j, 0);
}

/* The items so far do not count. */
static void from_forget(struct from *f)
{
	while (f->n > f->before)
		object_free(&f->got[--f->n]);
	f->kindless.len = 0;
	f->flaw[0] = 0;
}

/* An element of an "items": what it is in is not known yet. */
static void from_item(struct from *f)
{
	const struct split *s = &f->split;

	if (f->list != s->n_lists)
		from_forget(f);
	f->list = s->n_lists;
	if (f->flaw[0])
		return;
	json_take(&f->item, s);
	if (from_list(&f->item))
		fail("object %zu is a List in a List", f->n_seen);
	else if (json_is(&f->item, 0, JSMN_OBJECT) && !f->item.flaw &&
		 (json_get(&f->item, 0, "kind") < 0 || json_get(&f->item, 0, "apiVersion") < 0)) {
		buf_add(&f->kindless, s->text, s->len);
		return;
	} else if (!from_object(f, &f->item, ""))
		return;
	memcpy(f->flaw, why, sizeof(why));
}

/* The object around them, or one that has none. */
static int from_head(struct from *f)
{
	struct split again = { .shape = SPLIT_EVENTS };
	const char *kind, *at = f->kindless.at;
	size_t n;
	int items;

	json_take(&f->head, &f->split);
	kind = from_list(&f->head);
	if (!kind && f->split.size > MAX_OBJECT)
		f->head.flaw = "is longer than 2 MiB";
	items = json_get(&f->head, 0, "items");
	if (!kind || items < 0 || f->list != f->split.n_lists)
		from_forget(f);
	f->list = 0;
	if (!kind)
		return from_object(f, &f->head, "");
	if (f->head.flaw || (items >= 0 && !json_is(&f->head, items, JSMN_ARRAY)))
		return fail("%sList: %s", kind,
			    f->head.flaw ? f->head.flaw : "items must be an array");
	if (f->flaw[0])
		return fail("%s", f->flaw);
	n = f->kindless.len;
	while (n && split_feed(&again, &at, &n) == SPLIT_ITEM)
		if (json_take(&f->item, &again) || from_object(f, &f->item, kind)) {
			split_free(&again);
			return -1;
		}
	split_free(&again);
	return 0;
}

static int from_bytes(struct from *f, const char *at, size_t n)
{
	enum split_got got;
	int bad = 0;

	while (!bad && (got = split_feed(&f->split, &at, &n)) != SPLIT_MORE) {
		f->n_seen++;
		if (got == SPLIT_ITEM) {
			from_item(f);
		} else {
			bad = got == SPLIT_BAD ? -1 : from_head(f);
			f->kindless.len = 0;
			f->before = f->n;
		}
	}
	return bad;
}

static int from_stream(struct from *f, FILE *in)
{
	char bytes[16384];
	bool first = true;
	size_t n;

	while ((n = fread(bytes, 1, sizeof(bytes), in)) > 0) {
		size_t mark = first && n >= 3 && !memcmp(bytes, "\xef\xbb\xbf", 3) ? 3 : 0;

		first = false;
		if (from_bytes(f, bytes + mark, n - mark))
			return -1;
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
	for (size_t i = 0; i < f.n; i++) {
		if (!got)
			model_store(m, &f.got[i]);
		object_free(&f.got[i]);
	}
	for (enum kind k = 0; k < N_KINDS && !got; k++)
		model_sweep(m, k);
	free(f.got);
	free(f.head.tok);
	free(f.item.tok);
	buf_free(&f.kindless);
	split_free(&f.split);
	return got ? fail("%s: %s", strcmp(file, "-") ? file : "stdin", why) : 0;
}
/* === maps (entries into the datapath) =====================================
 * What a service has in the maps is remembered as a list of elements, a map and
 * a key each, sorted. To program it anew: write all its elements, what is
 * pointed at before what points; then drop those of the old list that the new
 * one lacks. A set of backends is named by a hash of its contents, so it never
 * changes, and the switch from one to the next is the write of one svc_map
 * value. Sets stay for a moment after the last service let go of them: a packet
 * may be looking at them. */
enum element_map { IN_NODE_TEXT, IN_TEXT, IN_NET, IN_SET, IN_SVC, IN_ADDRESS };

#define KEY_MOST  28	  /* bytes of the longest key below */
#define SET_GRACE 1000 /* ms; the datapath holds on to a set for microseconds */

struct element {
	uint8_t map, zero[3];
	union {
		char bytes[KEY_MOST];  /* first: an initializer zeroes all of it */
		struct tl_svc_key svc; /* IN_SVC, IN_ADDRESS */
		struct tl_set_key set;
		struct tl_text_key text; /* IN_TEXT, IN_NODE_TEXT */
		struct tl_net_key net;
	};
} __attribute__((packed, aligned(4))); /* compared as bytes */

_Static_assert(sizeof(struct tl_net_key) == KEY_MOST, "the longest key");

/* struct service's `programmed`. */
struct programmed {
	uint64_t udp; /* a hash of what its UDP flows may be bound to */
	uint64_t n;
	struct element at[];
};

/* How many services an address is written for. Names of nodes are here as well, not
 * in the services' lists: there are few, and they stay until the next start. */
struct shared {
	struct link link;
	struct element element;
	uint32_t refs;
};

/* Descriptors of the pinned maps, and what is remembered of their contents. */
static struct maps {
	int svc, set, text, net, ct, aff, frag, stat, agent;
	struct table shared;
	struct buf dying; /* elements of set_map and text_map that nothing points at any more */
	int64_t reap_at;  /* when they go; INT64_MAX: there are none */
	struct buf udp;	  /* uint64_t: what maps_flush_udp may keep, see udp_mark */
	bool udp_changed;
	bool adopted; /* the first sync is done: nothing unknown is left in the maps */
} maps = { .reap_at = INT64_MAX };

static int element_fd(const struct maps *m, enum element_map map)
{
	switch (map) {
	case IN_NODE_TEXT:
	case IN_TEXT:
		return m->text;
	case IN_NET:
		return m->net;
	case IN_SET:
		return m->set;
	default:
		return m->svc;
	}
}

static int element_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct element));
}

static bool element_in(const struct element *e, const struct element *at, size_t n)
{
	return n && bsearch(e, at, n, sizeof(*e), element_order);
}

static struct shared *shared_find(struct maps *m, const struct element *e)
{
	uint64_t hash = hash64(0, e, sizeof(*e));
	struct shared *s = NULL;

	while ((s = (struct shared *)table_next(&m->shared, (struct link *)s, hash)))
		if (!memcmp(&s->element, e, sizeof(*e)))
			break;
	return s;
}

static void shared_hold(struct maps *m, const struct element *e)
{
	struct shared *s = shared_find(m, e);

	if (!s) {
		s = mem(NULL, sizeof(*s));
		s->element = *e;
		s->refs = 0;
		table_add(&m->shared, &s->link, hash64(0, e, sizeof(*e)));
	}
	s->refs++;
}

/* True: that was the last one. */
static bool shared_release(struct maps *m, const struct element *e)
{
	struct shared *s = shared_find(m, e);

	if (!s || --s->refs)
		return false;
	table_remove(&m->shared, &s->link);
	free(s);
	return true;
}

/* --- writing one service --------------------------------------------------- */
/* What is being put together for a service: elements to remember; and whether
 * all of it could be written. */
struct writing {
	struct maps *maps;
	const struct programmed *old;
	struct buf elements;
	const char *ns, *name;
	bool failed;
};

/* Writes an element, unless it is there already and can only say the same.
 * Afterwards it is alive, even if it was dying. */
static void write_element(struct writing *w, struct element *e, const void *value, bool constant)
{
	bool there = w->old && element_in(e, w->old->at, w->old->n);
	struct element *dying = (struct element *)w->maps->dying.at;

	buf_add(&w->elements, e, sizeof(*e));
	for (size_t i = 0; i < w->maps->dying.len / sizeof(*e); i++)
		if (!memcmp(&dying[i], e, sizeof(*e)))
			dying[i] = dying[w->maps->dying.len / sizeof(*e) - 1], w->maps->dying.len -= sizeof(*e);
	if ((there && constant) || w->failed)
		return;
	if (bpf_map_update_elem(element_fd(w->maps, e->map), e->bytes, value, BPF_ANY)) {
		w->failed = true;
		warn("service %s/%s is not served as it should be: a map did not take it: %s", w->ns, w->name,
		     errno == E2BIG ? "it is full" : strerror(errno));
	}
}

/* A text in pieces; returns its number. */
static uint64_t write_text(struct writing *w, enum element_map map, const char *text, size_t n)
{
	struct element e = { .map = map };

	if (!n)
		return 0;
	e.text.text = hash64(0, text, n);
	for (size_t at = 0; at <= n; at += TL_TEXT) {
		struct tl_text piece = { { 0 } };

		memcpy(piece.at, text + at, n - at < TL_TEXT ? n - at : TL_TEXT);
		e.text.piece = at / TL_TEXT;
		if (map == IN_TEXT) {
			write_element(w, &e, &piece, true);
		} else if (!shared_find(w->maps, &e)) {
			shared_hold(w->maps, &e);
			bpf_map_update_elem(w->maps->text, e.bytes, &piece, BPF_ANY);
		}
	}
	return e.text.text;
}

/* The part of a backend that every node agrees on. */
static uint64_t backend_seed(const struct in6_addr *addr, uint16_t port)
{
	uint64_t seed = hash64(port, addr, sizeof(*addr));

	return seed ? seed : 1; /* 0 means none */
}

static void put_backend(struct writing *w, struct tl_backend *to, const struct backend *b, uint32_t index)
{
	*to = (struct tl_backend){
		.seed = backend_seed(&b->addr, b->port),
		.node = write_text(w, IN_NODE_TEXT, b->node, strlen(b->node)),
		.port = htons(b->port),
		.flags = b->local ? TL_BACKEND_LOCAL : 0,
		.index = index,
	};
	memcpy(&to->addr, &b->addr, sizeof(to->addr));
}

/* Writes the backends of an entry, at most TL_MAX_BACKENDS; the set's number is
 * of the service port and scope as well, so that no other entry has the same. */
static void write_set(struct writing *w, const struct entry *entry, struct tl_svc *svc)
{
	uint32_t n = entry->n_backends < TL_MAX_BACKENDS ? entry->n_backends : TL_MAX_BACKENDS;
	struct element e = { .map = IN_SET };
	struct tl_chunk chunk;

	if (n != (uint32_t)entry->n_backends)
		warn("service %s/%s has %d backends, more than the %u that are looked through: the rest gets nothing",
		     entry->ns, entry->name, entry->n_backends, n);
	svc->n_backends = n;
	svc->set = hash64(svc->name, &entry->scope, sizeof(entry->scope));
	for (uint32_t i = 0; i < n; i++) {
		const struct backend *b = &entry->backends[i];

		svc->set = hash64(svc->set ^ b->port ^ (uint64_t)b->local << 32, &b->addr, sizeof(b->addr));
		svc->set = hash64(svc->set, b->node, strlen(b->node));
	}
	e.set.set = svc->set;
	for (uint32_t c = 0; c * TL_CHUNK < n; c++) {
		for (uint32_t i = 0; i < TL_CHUNK; i++) { /* filled up with its first, see choose() */
			uint32_t index = c * TL_CHUNK + i < n ? c * TL_CHUNK + i : c * TL_CHUNK;

			put_backend(w, &chunk.at[i], &entry->backends[index], index);
		}
		e.set.chunk = c;
		write_element(w, &e, &chunk, true);
	}
}

static void write_sources(struct writing *w, const struct entry *entry, uint64_t name)
{
	struct element e = { .map = IN_NET };
	uint32_t one = 1;

	for (int i = 0; i < entry->n_sources; i++) {
		e.net.prefixlen = 64 + entry->sources[i].bits;
		e.net.scope[0] = name;
		e.net.scope[1] = name >> 32;
		memcpy(&e.net.addr, &entry->sources[i].addr, sizeof(e.net.addr));
		write_element(w, &e, &one, true);
	}
}

static void write_frontends(struct writing *w, const struct entry *entry, const struct tl_svc *svc)
{
	struct tl_svc address = { 0 };

	for (int i = 0; i < entry->n_frontends; i++) {
		struct element e = { .map = IN_SVC };

		memcpy(&e.svc.addr, &entry->frontends[i].addr, sizeof(e.svc.addr));
		e.svc.port = htons(entry->frontends[i].port);
		e.svc.proto = entry->proto;
		write_element(w, &e, svc, false);
		e.map = IN_ADDRESS;
		e.svc.port = 0;
		e.svc.proto = 0;
		write_element(w, &e, &address, true);
	}
}

/* Bounded by what objects may be called (MAX_NAME, MAX_PORTNAME). */
static size_t entry_text(const struct entry *e, char text[600])
{
	return snprintf(text, 600, "%s/%s/%s/%d", e->ns, e->name, e->port, e->proto);
}

/* UDP flows may stay if service port, frontend and backend are among these
 * numbers; those of service ports that are not are left alone (rule 17). */
static uint64_t udp_mark(uint64_t name, char what, const struct in6_addr *addr, uint16_t port)
{
	return hash64(name ^ (uint64_t)what << 24 ^ port, addr, sizeof(*addr));
}

static uint64_t entry_udp(struct maps *m, const struct entry *e, uint64_t name)
{
	uint64_t sum = 0, mark;

	for (int i = 0; i < e->n_frontends + e->n_serving; i++) {
		bool front = i < e->n_frontends;
		const struct backend *b = &e->serving[i - e->n_frontends];

		mark = front ? udp_mark(name, 'F', &e->frontends[i].addr, e->frontends[i].port) :
			       udp_mark(name, 'B', &b->addr, b->port);
		buf_add(&m->udp, &mark, sizeof(mark));
		sum += mark;
	}
	return sum;
}

static void write_entry(struct writing *w, const struct entry *entry, struct programmed *new)
{
	char text[600];
	struct tl_svc svc = {
		.affinity = entry->affinity,
		.flags = entry->scope | (entry->drop_if_empty ? TL_SVC_DROP_IF_EMPTY : 0) |
			 (entry->n_sources ? TL_SVC_SOURCES : 0),
	};

	svc.name = write_text(w, IN_TEXT, text, entry_text(entry, text));
	write_sources(w, entry, svc.name);
	write_set(w, entry, &svc);
	write_frontends(w, entry, &svc);
	if (entry->proto == IPPROTO_UDP) {
		new->udp += entry_udp(w->maps, entry, svc.name);
		buf_add(&w->maps->udp, &svc.name, sizeof(svc.name));
	}
}

/* An element that the service no longer has goes, now or soon: a frontend only
 * if it is still this service's, an address with its last holder. */
static void drop_element(struct maps *m, const struct element *e, const struct programmed *old)
{
	struct element name = { .map = IN_TEXT };
	struct tl_svc svc;

	if (e->map == IN_SVC) {
		if (bpf_map_lookup_elem(m->svc, e->bytes, &svc))
			return;
		name.text.text = svc.name;
		if (!element_in(&name, old->at, old->n))
			return; /* another service has taken it over */
	}
	if (e->map == IN_ADDRESS && !shared_release(m, e))
		return;
	if (e->map == IN_SET || e->map == IN_TEXT) {
		buf_add(&m->dying, e, sizeof(*e));
		m->reap_at = now_ms() + SET_GRACE;
		return;
	}
	bpf_map_delete_elem(element_fd(m, e->map), e->bytes);
}

/* Elements as a set: sorted, each once. */
static size_t elements_sort(struct element *at, size_t n)
{
	size_t kept = 0;

	qsort(at, n, sizeof(*at), element_order);
	for (size_t i = 0; i < n; i++)
		if (!i || element_order(&at[i], &at[kept - 1]))
			at[kept++] = at[i];
	return kept;
}

/* Brings the maps to what `entries` say of the service, and `*memory` (its
 * `programmed`) with it. */
static void maps_put(struct maps *m, void **memory, const char *ns, const char *name,
		     const struct entry *entries, int n)
{
	struct programmed *old = *memory, *new, header = { 0 };
	struct writing w = { .maps = m, .old = old, .ns = ns, .name = name };

	buf_add(&w.elements, &header, sizeof(header));
	for (int i = 0; i < n; i++)
		write_entry(&w, &entries[i], &header);
	new = (struct programmed *)w.elements.at;
	new->udp = header.udp;
	new->n = elements_sort(new->at, (w.elements.len - sizeof(header)) / sizeof(*new->at));
	new = mem(new, sizeof(*new) + new->n * sizeof(*new->at));
	for (uint64_t i = 0; i < new->n; i++)
		if (new->at[i].map == IN_ADDRESS && !(old && element_in(&new->at[i], old->at, old->n)))
			shared_hold(m, &new->at[i]);
	for (uint64_t i = old ? old->n : 0; i-- > 0;) /* from the last map to the first: pointers first */
		if (!element_in(&old->at[i], new->at, new->n))
			drop_element(m, &old->at[i], old);
	if (old && old->udp != new->udp) { /* names of service ports that are gone count as looked at */
		m->udp_changed = true;
		for (uint64_t i = 0; i < old->n; i++)
			if (old->at[i].map == IN_TEXT)
				buf_add(&m->udp, &old->at[i].text.text, sizeof(uint64_t));
	}
	free(old);
	*memory = n ? new : NULL;
	if (!n)
		free(new);
}

/* Deletes the elements nothing has pointed at for a while. */
static void maps_reap(struct maps *m)
{
	struct element *e = (struct element *)m->dying.at;

	for (size_t i = 0; i < m->dying.len / sizeof(*e); i++)
		bpf_map_delete_elem(element_fd(m, e[i].map), e[i].bytes);
	buf_free(&m->dying);
	m->reap_at = INT64_MAX;
}

/* --- flows ----------------------------------------------------------------- */
static int number_order(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static bool number_in(const struct buf *numbers, uint64_t number)
{
	return numbers->len && bsearch(&number, numbers->at, numbers->len / sizeof(number), sizeof(number),
				       number_order);
}

/* Calls `each` for all flows, many at a time; false: ct_map could not be read. */
static bool flows_walk(int fd, void (*each)(void *arg, const struct tl_tuple *, const struct tl_flow *),
		       void *arg)
{
	enum { AT_ONCE = 1024 };
	struct tl_tuple *keys = mem(NULL, AT_ONCE * sizeof(*keys));
	struct tl_flow *flows = mem(NULL, AT_ONCE * sizeof(*flows));
	uint64_t batch = 0;
	bool more = true, begun = false, good = true;

	while (more) {
		uint32_t n = AT_ONCE;
		int r = bpf_map_lookup_batch(fd, begun ? &batch : NULL, &batch, keys, flows, &n, NULL);

		more = !r;
		good = !r || errno == ENOENT;
		begun = true;
		for (uint32_t i = 0; i < n && good; i++)
			each(arg, &keys[i], &flows[i]);
	}
	free(keys);
	free(flows);
	return good;
}

static void flow_flush(void *arg, const struct tl_tuple *t, const struct tl_flow *f)
{
	struct maps *m = arg;
	bool request = t->dir == TL_REQUEST;
	struct in6_addr front, back;
	uint16_t front_port = ntohs(request ? t->dport : f->sport);
	uint16_t back_port = ntohs(request ? f->dport : t->sport);

	if (t->proto != IPPROTO_UDP || (m->adopted && !number_in(&m->udp, f->name)))
		return;
	memcpy(&front, request ? &t->dst : &f->src, sizeof(front));
	memcpy(&back, request ? &f->dst : &t->src, sizeof(back));
	if (!number_in(&m->udp, udp_mark(f->name, 'F', &front, front_port)) ||
	    !number_in(&m->udp, udp_mark(f->name, 'B', &back, back_port)))
		bpf_map_delete_elem(m->ct, t);
}

/* After a sync: UDP flows go whose frontend or backend does (rule 17); a client
 * that keeps sending would never notice. */
static void maps_flush_udp(struct maps *m)
{
	if (m->udp_changed || !m->adopted) {
		qsort(m->udp.at, m->udp.len / sizeof(uint64_t), sizeof(uint64_t), number_order);
		if (!flows_walk(m->ct, flow_flush, m))
			warn("ct_map could not be read (%s): UDP flows of lost backends may linger",
			     strerror(errno));
	}
	buf_free(&m->udp);
	m->udp_changed = false;
}

/* --- adopting what an earlier run left ------------------------------------- */
/* Deletes from a map what no service has; `known` is sorted. */
static void map_sweep(struct maps *m, enum element_map map, const struct element *known, size_t n)
{
	int fd = element_fd(m, map);
	struct element e = { 0 }, next = { 0 };
	bool more = !bpf_map_get_next_key(fd, NULL, next.bytes);

	while (more) {
		e = next;
		more = !bpf_map_get_next_key(fd, e.bytes, next.bytes);
		e.map = map;
		if (map == IN_SVC && !e.svc.port)
			e.map = IN_ADDRESS;
		if (element_in(&e, known, n) ||
		    (map == IN_TEXT && (e.map = IN_NODE_TEXT, element_in(&e, known, n))))
			continue;
		bpf_map_delete_elem(fd, e.bytes);
	}
}

/* Ranges that are ours whatever stands in them (rule 16): an address of theirs that no
 * service has is dropped. */
static void write_ranges(struct maps *m, struct buf *known)
{
	uint32_t one = 1;

	for (int i = opt.has_vip_range ? -1 : 0; i < opt.n_maps; i++) {
		const struct cidr *range = i < 0 ? &opt.vip_range : &opt.maps[i].from;
		struct element e = { .map = IN_NET, .net.prefixlen = 64 + range->bits };

		memcpy(&e.net.addr, &range->addr, sizeof(e.net.addr));
		bpf_map_update_elem(m->net, e.bytes, &one, BPF_ANY);
		buf_add(known, &e, sizeof(e));
	}
}

/* Once, after everything was written for the first time. */
static void maps_adopt(struct maps *m, struct table *services)
{
	struct buf known = { 0 };
	size_t n;

	TABLE_EACH(services, l) {
		struct programmed *p = ((struct service *)l)->programmed;

		if (p)
			buf_add(&known, p->at, p->n * sizeof(*p->at));
	}
	TABLE_EACH(&m->shared, l)
		buf_add(&known, &((struct shared *)l)->element, sizeof(struct element));
	write_ranges(m, &known);
	n = known.len ? elements_sort((struct element *)known.at, known.len / sizeof(struct element)) : 0;
	map_sweep(m, IN_SVC, (struct element *)known.at, n);
	map_sweep(m, IN_NET, (struct element *)known.at, n);
	map_sweep(m, IN_SET, (struct element *)known.at, n);
	map_sweep(m, IN_TEXT, (struct element *)known.at, n);
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
		maps_put(m, &s->programmed, s->ns, s->name, r.entries, r.n);
		changed = true;
		if (s->gone)
			model_forget(model, s);
	}
	if (changed || !m->adopted)
		maps_flush_udp(m);
	if (!m->adopted)
		maps_adopt(m, &model->services);
	m->adopted = true;
	return changed;
}
/* === interfaces (rtnetlink) ===============================================
 * Which interfaces there are, told by the kernel when it changes: group
 * RTNLGRP_LINK, and a dump to begin with or when messages were lost. */
struct link_news {
	int ifindex;
	bool gone;
	unsigned short type; /* ARPHRD_* */
	char name[IF_NAMESIZE];
};

/* A socket that hears of links; -1 with why. */
static int netlink_open(void)
{
	struct sockaddr_nl me = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE);

	if (fd >= 0 && !bind(fd, (struct sockaddr *)&me, sizeof(me)))
		return fd;
	fail("cannot ask the kernel for interfaces: netlink: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Asks for all links; they come like news. */
static void netlink_ask(int fd)
{
	struct {
		struct nlmsghdr h;
		struct ifinfomsg i;
	} ask = { .h = { .nlmsg_len = sizeof(ask),
			 .nlmsg_type = RTM_GETLINK,
			 .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP } };

	if (send(fd, &ask, sizeof(ask), 0) < 0)
		warn("netlink: %s", strerror(errno));
}

static bool link_read(const struct nlmsghdr *h, struct link_news *news)
{
	const struct ifinfomsg *i = NLMSG_DATA(h);
	int left = IFLA_PAYLOAD(h);

	if ((h->nlmsg_type != RTM_NEWLINK && h->nlmsg_type != RTM_DELLINK) || i->ifi_family != AF_UNSPEC)
		return false;
	*news = (struct link_news){ .ifindex = i->ifi_index,
				    .gone = h->nlmsg_type == RTM_DELLINK,
				    .type = i->ifi_type };
	for (const struct rtattr *a = IFLA_RTA(i); RTA_OK(a, left); a = RTA_NEXT(a, left))
		if (a->rta_type == IFLA_IFNAME)
			snprintf(news->name, sizeof(news->name), "%s", (const char *)RTA_DATA(a));
	return true;
}

/* Reads what is there and calls `on` for each link; true: the end of a dump
 * was among it. Lost messages are asked for again. */
static bool netlink_read(int fd, void (*on)(void *arg, const struct link_news *), void *arg)
{
	_Alignas(struct nlmsghdr) char room[16384];
	struct link_news news;
	bool done = false;
	ssize_t n;

	while ((n = recv(fd, room, sizeof(room), 0)) > 0 || (n < 0 && errno == ENOBUFS)) {
		if (n < 0) {
			netlink_ask(fd);
			continue;
		}
		for (struct nlmsghdr *h = (struct nlmsghdr *)room; NLMSG_OK(h, n); h = NLMSG_NEXT(h, n)) {
			done |= h->nlmsg_type == NLMSG_DONE;
			if (link_read(h, &news))
				on(arg, &news);
		}
	}
	return done;
}
/* === doors (programs on interfaces) =======================================
 * Everything we leave in the kernel hangs on files in the pin directory:
 *   svc_map, ct_map, ...      the maps
 *   from_IFINDEX, to_IFINDEX  the doors of an interface: a tcx link each, or where
 *                             there is no tcx the program, attached by cls_bpf
 *   clsact_IFINDEX            we made this interface's clsact qdisc (any map, for
 *                             a file to exist)
 * so whoever comes after us, also after kill -9, knows what is ours. */
#define BPFFS	    "/sys/fs/bpf"
#define MOUNT_NAME  "tail_lifter" /* the source of a bpffs that we mounted */
#define TC_PRIORITY 43171	  /* for cls_bpf: our own, and a handle */
#define TC_HANDLE   0x7a11
#ifndef ARPHRD_RAWIP
#define ARPHRD_RAWIP 519 /* linux/if_arp.h, which does not go together with net/if.h */
#define ARPHRD_NONE  0xfffe
#endif

static char *pin_path(char path[PATH_MAX], const char *word, int ifindex)
{
	if (ifindex)
		snprintf(path, PATH_MAX, "%s/%s_%d", opt.pin_dir, word, ifindex);
	else
		snprintf(path, PATH_MAX, "%s/%s", opt.pin_dir, word);
	return path;
}

static bool is_bpffs(const char *path)
{
	struct statfs fs;

	return !statfs(path, &fs) && (unsigned long)fs.f_type == BPF_FS_MAGIC;
}

/* The pin directory, made if it is not there; a descriptor or -1 with why. */
static int pin_dir_open(void)
{
	char parent[PATH_MAX];
	char *slash;

	snprintf(parent, sizeof(parent), "%s", opt.pin_dir);
	slash = strrchr(parent, '/');
	if (slash && slash != parent)
		*slash = 0;
	if (!is_bpffs(parent) && !strcmp(parent, BPFFS) && mount(MOUNT_NAME, BPFFS, "bpf", 0, NULL))
		return fail("no bpffs at %s and it cannot be mounted: %s; mount -t bpf bpf %s, or name another "
			    "by --pin-dir", BPFFS, strerror(errno), BPFFS);
	if (!is_bpffs(parent))
		return fail("%s is not in a bpffs: --pin-dir must name a directory below one, such as %s/tail_lifter",
			    opt.pin_dir, BPFFS);
	if (mkdir(opt.pin_dir, 0700) && errno != EEXIST)
		return fail("cannot make %s: %s; run as root", opt.pin_dir, strerror(errno));
	int fd = open(opt.pin_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

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
	for (int tries = 0; tries < 20; tries++) {
		if (!flock(fd, LOCK_EX | LOCK_NB))
			return true;
		usleep(10000);
	}
	return false;
}

static int pinned(const char *word, int ifindex)
{
	char path[PATH_MAX];

	return bpf_obj_get(pin_path(path, word, ifindex));
}

static void unpin(const char *word, int ifindex)
{
	char path[PATH_MAX];

	unlink(pin_path(path, word, ifindex));
}

static int pin(int fd, const char *word, int ifindex)
{
	char path[PATH_MAX];

	unlink(pin_path(path, word, ifindex));
	return bpf_obj_pin(fd, path) ? fail("cannot pin %s: %s", path, strerror(errno)) : 0;
}

/* A pinned door is a link (tcx) or a program (cls_bpf). */
static bool is_tcx_link(int fd, struct bpf_link_info *info)
{
	uint32_t len = sizeof(*info);
	char self[64], what[64] = "";

	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	if (readlink(self, what, sizeof(what) - 1) < 0 || strcmp(what, "anon_inode:bpf-link"))
		return false;
	memset(info, 0, sizeof(*info));
	return !bpf_link_get_info_by_fd(fd, info, &len) && info->type == BPF_LINK_TYPE_TCX;
}

static struct bpf_tc_hook tc_hook(int ifindex, enum bpf_tc_attach_point point)
{
	return (struct bpf_tc_hook){ .sz = sizeof(struct bpf_tc_hook), .ifindex = ifindex, .attach_point = point };
}

/* By cls_bpf, where there is no tcx. Replaces a filter of ours in one step. */
static int door_attach_tc(int prog, const char *word, int ifindex, bool in)
{
	struct bpf_tc_hook hook = tc_hook(ifindex, in ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	DECLARE_LIBBPF_OPTS(bpf_tc_opts, o, .prog_fd = prog, .flags = BPF_TC_F_REPLACE,
			    .handle = TC_HANDLE, .priority = TC_PRIORITY);
	int r = bpf_tc_hook_create(&hook);

	if (r && r != -EEXIST)
		return fail("cannot make a clsact qdisc: %s; the kernel needs sch_ingress", strerror(-r));
	if (!r && pin(maps.stat, "clsact", ifindex))
		return -1;
	r = bpf_tc_attach(&hook, &o);
	if (r)
		return fail("cannot attach by cls_bpf: %s; the kernel needs cls_bpf", strerror(-r));
	return pin(prog, word, ifindex);
}

/* Puts `prog` behind a door; one of an earlier run is taken over in one step, so
 * no packet goes by unseen. 0, or -1 with why. */
static int door_attach(int prog, const char *word, int ifindex, bool in)
{
	struct bpf_link_info info;
	int old = pinned(word, ifindex), r;
	bool ours;

	if (old >= 0) {
		ours = is_tcx_link(old, &info) && info.tcx.ifindex == (uint32_t)ifindex &&
		       !bpf_link_update(old, prog, NULL);
		close(old);
		if (ours)
			return 0;
	}
	int link = bpf_link_create(prog, ifindex, in ? BPF_TCX_INGRESS : BPF_TCX_EGRESS, NULL);

	if (link < 0)
		return errno == EINVAL ? door_attach_tc(prog, word, ifindex, in) :
					 fail("cannot attach by tcx: %s", strerror(errno));
	r = pin(link, word, ifindex);
	close(link);
	return r;
}

/* How many filters others have at an interface's clsact qdisc; -1: unknown. */
static int tc_filters(int ifindex, uint32_t parent)
{
	struct {
		struct nlmsghdr h;
		struct tcmsg t;
	} ask = { .h = { .nlmsg_len = sizeof(ask),
			 .nlmsg_type = RTM_GETTFILTER,
			 .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP },
		  .t = { .tcm_ifindex = ifindex, .tcm_parent = parent } };
	_Alignas(struct nlmsghdr) char room[16384];
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), count = 0;
	ssize_t n = fd < 0 ? -1 : send(fd, &ask, sizeof(ask), 0);

	while (n > 0 && (n = recv(fd, room, sizeof(room), 0)) > 0)
		for (struct nlmsghdr *h = (struct nlmsghdr *)room; NLMSG_OK(h, n); h = NLMSG_NEXT(h, n)) {
			if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) {
				close(fd);
				return h->nlmsg_type == NLMSG_DONE ? count : -1;
			}
			count += h->nlmsg_type == RTM_NEWTFILTER;
		}
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Takes our filters away, and the qdisc if we made it and nobody uses it now. */
static void doors_detach_tc(int ifindex)
{
	struct bpf_tc_hook hook = tc_hook(ifindex, BPF_TC_INGRESS);
	int made = pinned("clsact", ifindex);

	for (int in = 0; in < 2; in++) {
		DECLARE_LIBBPF_OPTS(bpf_tc_opts, o, .handle = TC_HANDLE, .priority = TC_PRIORITY);

		hook.attach_point = in ? BPF_TC_INGRESS : BPF_TC_EGRESS;
		bpf_tc_detach(&hook, &o);
	}
	if (made < 0)
		return;
	close(made);
	if (tc_filters(ifindex, TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)) ||
	    tc_filters(ifindex, TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)))
		return;
	hook.attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS;
	bpf_tc_hook_destroy(&hook);
}

/* Leaves an interface as it was before us; also one that is no longer there. */
static void doors_detach(int ifindex)
{
	struct bpf_link_info info;
	int fd = pinned("from", ifindex);
	bool tcx = fd >= 0 && is_tcx_link(fd, &info);

	if (fd >= 0)
		close(fd);
	if (fd >= 0 && !tcx && if_indextoname(ifindex, (char[IF_NAMESIZE]){ 0 }))
		doors_detach_tc(ifindex);
	unpin("from", ifindex); /* a link goes with its last holder */
	unpin("to", ifindex);
	unpin("clsact", ifindex);
}

/* The interfaces whose doors are pinned: up to `most` of them, in order. */
static int doors_list(int *ifindex, int most)
{
	DIR *dir = opendir(opt.pin_dir);
	struct dirent *d;
	int n = 0;

	while (dir && n < most && (d = readdir(dir)))
		if (sscanf(d->d_name, "from_%d", &ifindex[n]) == 1)
			n++;
	if (dir)
		closedir(dir);
	for (int i = 1; i < n; i++) /* a handful */
		for (int k = i; k > 0 && ifindex[k] < ifindex[k - 1]; k--) {
			int swap = ifindex[k];

			ifindex[k] = ifindex[k - 1];
			ifindex[k - 1] = swap;
		}
	return n;
}

/* --- the object: programs and maps ------------------------------------------ */
static struct tail_lifter *bpf;
static struct buf bpf_log; /* what libbpf and the verifier said while loading */

static int on_libbpf(enum libbpf_print_level level, const char *fmt, va_list ap)
{
	char text[4096];

	if (level == LIBBPF_DEBUG)
		return 0;
	vsnprintf(text, sizeof(text), fmt, ap);
	buf_printf(&bpf_log, "%s", text);
	return 0;
}

/* Is the pinned map what this program was built for? */
static bool map_fits(int fd, const struct bpf_map *map)
{
	struct bpf_map_info info = { 0 };
	uint32_t len = sizeof(info);

	return !bpf_map_get_info_by_fd(fd, &info, &len) && info.type == bpf_map__type(map) &&
	       info.key_size == bpf_map__key_size(map) && info.value_size == bpf_map__value_size(map) &&
	       info.max_entries == bpf_map__max_entries(map) && info.map_flags == bpf_map__map_flags(map);
}

static bool map_is_pinned(const struct bpf_map *map)
{
	return !bpf_map__is_internal(map) && strcmp(bpf_map__name(map), "packet_map");
}

struct flow_copy {
	int to;
	uint32_t n;
};

static void flow_copy(void *arg, const struct tl_tuple *t, const struct tl_flow *f)
{
	struct flow_copy *copy = arg;

	copy->n += !bpf_map_update_elem(copy->to, t, f, BPF_NOEXIST);
}

/* Puts the maps of an earlier run into the object, where they still fit. One
 * that does not is replaced: what the agent writes it writes again, and flows
 * are carried over if only --flows changed. */
static int maps_reuse(int *old_flows)
{
	struct bpf_map_info info = { 0 };
	uint32_t len = sizeof(info);
	struct bpf_map *map;

	*old_flows = -1;
	bpf_object__for_each_map(map, bpf->obj) {
		int fd = map_is_pinned(map) ? pinned(bpf_map__name(map), 0) : -1;

		if (fd < 0)
			continue;
		if (map_fits(fd, map)) {
			if (bpf_map__reuse_fd(map, fd))
				return fail("cannot adopt %s: %s", bpf_map__name(map), strerror(errno));
		} else if (map == bpf->maps.ct_map && !bpf_map_get_info_by_fd(fd, &info, &len) &&
			   info.key_size == sizeof(struct tl_tuple) &&
			   info.value_size == sizeof(struct tl_flow)) {
			*old_flows = fd;
			continue;
		}
		close(fd);
	}
	return 0;
}

/* Files of the maps that are new. From the old ones flows move over first. */
static int maps_pin(int old_flows)
{
	struct flow_copy copy = { .to = bpf_map__fd(bpf->maps.ct_map) };
	struct bpf_map *map;

	if (old_flows >= 0 && flows_walk(old_flows, flow_copy, &copy))
		note("ct_map has a new size: %u of its entries were carried over", copy.n);
	bpf_object__for_each_map(map, bpf->obj) {
		int fd = map_is_pinned(map) ? pinned(bpf_map__name(map), 0) : -1;
		bool fits = fd >= 0 && map_fits(fd, map);

		if (fd >= 0)
			close(fd);
		if (map_is_pinned(map) && !fits && pin(bpf_map__fd(map), bpf_map__name(map), 0))
			return -1;
	}
	return 0;
}

static void maps_open(struct maps *m)
{
	m->svc = bpf_map__fd(bpf->maps.svc_map);
	m->set = bpf_map__fd(bpf->maps.set_map);
	m->text = bpf_map__fd(bpf->maps.text_map);
	m->net = bpf_map__fd(bpf->maps.net_map);
	m->ct = bpf_map__fd(bpf->maps.ct_map);
	m->stat = bpf_map__fd(bpf->maps.stat_map);
	m->agent = bpf_map__fd(bpf->maps.agent_map);
}

/* Loads the programs, with the maps of an earlier run where there are any.
 * 0, or -1 with why. */
static int datapath_load(struct maps *m)
{
	struct timespec tick;
	int old_flows, r;

	bpf = tail_lifter__open();
	if (!bpf)
		return fail("cannot open the BPF object: %s", strerror(errno));
	clock_getres(CLOCK_MONOTONIC_COARSE, &tick); /* one jiffy */
	bpf->rodata->tl_hz = (1000000000 + tick.tv_nsec / 2) / tick.tv_nsec;
	bpf_map__set_max_entries(bpf->maps.ct_map, opt.flows);
	if (maps_reuse(&old_flows))
		return -1;
	r = tail_lifter__load(bpf);
	if (r == -EPERM || r == -EACCES) {
		if (geteuid() || loud < 2)
			return fail("the kernel does not let us load BPF programs (%s): run as root, or with "
				    "CAP_BPF and CAP_NET_ADMIN; -v prints what it says", strerror(-r));
	}
	if (r) {
		if (loud > 1)
			fwrite(bpf_log.at, 1, bpf_log.len, stderr);
		return fail("this kernel does not take our BPF programs: %s; it must be 5.10 or newer with "
			    "CONFIG_BPF_SYSCALL; -v prints its reasons", strerror(-r));
	}
	buf_free(&bpf_log);
	r = maps_pin(old_flows);
	if (old_flows >= 0)
		close(old_flows);
	maps_open(m);
	return r;
}

/* By its ARPHRD_ type. */
static bool is_ethernet(unsigned short type)
{
	return type == ARPHRD_ETHER || type == ARPHRD_LOOPBACK;
}

/* Both doors of an interface; 0, or -1 with why. */
static int doors_attach(const struct link_news *l)
{
	bool l2 = is_ethernet(l->type);
	bool l3 = l->type == ARPHRD_NONE || l->type == ARPHRD_RAWIP || l->type == ARPHRD_PPP ||
		  l->type == ARPHRD_TUNNEL || l->type == ARPHRD_TUNNEL6 || l->type == ARPHRD_IPGRE;
	struct bpf_program *from = l2 ? bpf->progs.from_tailnet_l2 : bpf->progs.from_tailnet;
	struct bpf_program *to = l2 ? bpf->progs.to_tailnet_l2 : bpf->progs.to_tailnet;

	if (!l2 && !l3)
		return fail("interface %s is of a kind we cannot read (ARPHRD type %d): it must carry Ethernet or "
			    "bare IP", l->name, l->type);
	if (door_attach(bpf_program__fd(to), "to", l->ifindex, false) ||
	    door_attach(bpf_program__fd(from), "from", l->ifindex, true)) {
		doors_detach(l->ifindex);
		return fail("interface %s: %s", l->name, why);
	}
	return 0;
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
 * the model keeps its last good state. */

#define LIST_PAGE     500    /* objects asked for at once; the server's memory, not ours */
#define MAX_REFUSAL   4096   /* bytes kept of an error's text */
#define MAX_ADDRESSES 8	     /* of a server's name */
#define WAIT_CONNECT  10000  /* ms: name; TCP and TLS, each address */
#define WAIT_ANSWER   60000  /* ms until an answer begins */
#define WAIT_BODY     30000  /* ms without a byte of a list */
#define WAIT_STREAM   5000   /* ms until initial events; some servers do not know them */
#define WAIT_LIST     300000 /* ms for one whole answer that is no watch */
#define PROVEN	      5000   /* ms a watch must last to count as a success */
#define PAUSE_LEAST   200
#define PAUSE_MOST    30000
#define PAUSE_BUSY    60000  /* where Retry-After asks for a minute or more */
#define PAUSE_NODES   600000 /* PAUSE_MOST where RBAC forbids nodes */

/* Neither of kube-proxy's two labels. */
#define SELECTOR "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name" \
		 "%2C%21service.kubernetes.io%2Fheadless"

static const struct resource {
	const char *word, *path, *select;
} resources[N_KINDS] = {
	[SERVICES] = { "services", "/api/v1/services", SELECTOR },
	[SLICES] = { "endpointslices", "/apis/discovery.k8s.io/v1/endpointslices", SELECTOR },
	[NODES] = { "nodes", "/api/v1/nodes", "fieldSelector=metadata.name%3D" },
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
	int64_t until;		 /* when the server should have ended the watch */
	int64_t least;		 /* of the next pause */
	unsigned failures;	 /* in a row */
	bool no_stream;		 /* the server cannot stream a list */
	bool no_pages;		 /* paging was too slow for it: all in one */
	bool lost;		 /* could not connect: the server may be another by now */
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
	tls_close(&w->tls);
	http_reset(&w->http);
	split_free(&w->split);
	buf_free(&w->text);
}

/* Closes, and goes on after a pause that doubles with each failure in a row; the
 * first time at once if `eager`. */
static void watch_pause(struct api *a, struct watch *w, bool eager)
{
	int64_t pause = PAUSE_LEAST << (w->failures < 8 ? w->failures : 8);

	pause = pause < PAUSE_MOST ? pause : PAUSE_MOST;
	pause = eager && !w->failures ? 0 : pause / 2 + random_bits() % (pause / 2 + 1);
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
	else if (!a->failed && (!w->least || w->failures > 4)) /* a busy server is asked again */
		a->failed = strdup(why);
	a->troubled |= 1 << w->kind;
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

	w->until = a->now + (seconds + 30) * 1000;
	if (*w->rv)
		w->ask = w->lost ? ASK_PROBE : ASK_WATCH;
	else
		w->ask = w->no_stream || a->once ? ASK_LIST : ASK_STREAM;
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
	watch_enter(a, w, WATCH_ASKING, WAIT_ANSWER);
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
		return watch_connect(a, w);
	fail("the name %s has no address: ask DNS, or /etc/hosts", a->config.host);
	watch_fail(a, w);
}

static void watch_connect_new(struct api *a, struct watch *w)
{
	const char *host = a->config.host;
	int fds[2], child;

	watch_close(a, w);
	w->addr = 0;
	w->n_addrs = addr_parse(host, strlen(host), w->addrs);
	if (!strcmp(host, "localhost"))
		w->n_addrs = addr_parse("127.0.0.1", 9, &w->addrs[0]) +
			addr_parse("::1", 3, &w->addrs[1]);
	if (w->n_addrs)
		return watch_connect(a, w);
	watch_enter(a, w, WATCH_RESOLVING, WAIT_CONNECT * 2);
	if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) || (child = fork()) < 0) {
		fail("cannot look %s up: %s", host, strerror(errno));
		return watch_fail(a, w);
	}
	if (!child)
		resolve_name(host, fds[1]);
	close(fds[1]);
	w->pipe = fds[0];
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
	w->no_pages = w->lost = false;
	json_reset(&a->json);
	if (a->once && m->synced[SERVICES] && m->synced[SLICES] && w->kind != NODES)
		a->watch[NODES].deadline = a->now; /* last, for its absence is no failure */
}

static void watch_follow(struct api *a, struct watch *w)
{
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
		w->no_pages |= w->more.len > 0;
		w->rv[0] = 0;
		return AGAIN;
	}
	if (w->state == WATCH_STREAMING || /* etcd 3.4 cannot */
	    (w->ask == ASK_STREAM && (code == 400 || code == 422 || code == 500))) {
		w->no_stream = true;
		return AGAIN;
	}
	if (code == 403 && m->synced[w->kind] && w->failures < 5)
		return AGAIN; /* a server that has just started does not know its RBAC yet */
	if (code == 429 || code == 503)
		w->least = w->http.retry_after < 60 ? w->http.retry_after * 1000 + 1 : PAUSE_BUSY;
	watch_explain(a, w, code, status);
	if (code != 403 || w->kind != NODES)
		return FAILED;
	fail("%s: %s", a->config.source, why);
	api_say(a, "; going on without the zone of our node");
	a->troubled &= ~(1 << NODES);
	if (!m->synced[NODES]) {
		model_mark(m, NODES);
		watch_complete(a, m, w);
	}
	w->least = PAUSE_LEAST << (w->failures < 16 ? w->failures : 16);
	w->least = w->least < PAUSE_NODES ? w->least : PAUSE_NODES;
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
	if (a->once && !w->more.len)
		w->least = INT32_MAX; /* that was all */
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
	int64_t late;

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
		if (w->state > WATCH_ASKING && w->state < WATCH_FOLLOWING)
			w->deadline = late < w->since + WAIT_LIST ? late : w->since + WAIT_LIST;
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
		a->watch[k].deadline = a->once && k == NODES ? INT64_MAX : a->now;
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
	fail("the server does not go on answering about %s", resources[w->kind].word);
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
/* === the loop =============================================================
 * One process, one epoll, one clock reading a round. Events change the model;
 * when all that was ready has been read, what is dirty goes to the maps. Nothing
 * here exits but by SIGTERM: what fails is said, and tried again when something
 * changes or a deadline comes. */
#define MAX_IFACES 8 /* of --iface */

enum wake_tag { WAKE_SIGNAL, WAKE_NETLINK, WAKE_API };

struct iface {
	char name[IF_NAMESIZE];
	int ifindex; /* 0: not there, or not ours yet */
	char said[sizeof(why)]; /* the last failure to attach */
};

static struct agent {
	struct model model;
	struct api api;
	struct iface iface[MAX_IFACES];
	int n_iface;
	int epoll_fd, signal_fd, netlink_fd;
	bool attach;  /* the maps hold a state worth attaching to */
	bool stop;    /* SIGTERM, SIGINT */
	bool refused; /* the first state must not be programmed: why */
	struct tl_agent status;
} agent;

static void status_write(struct agent *a)
{
	uint32_t zero = 0;

	snprintf(a->status.node, sizeof(a->status.node), "%s", opt.node);
	snprintf(a->status.zone, sizeof(a->status.zone), "%s",
		 a->model.places.zone ? a->model.places.zone : "");
	bpf_map_update_elem(maps.agent, &zero, &a->status, BPF_ANY);
}

/* --- interfaces ------------------------------------------------------------- */
static struct iface *iface_named(struct agent *a, const char *name)
{
	for (int i = 0; i < a->n_iface; i++)
		if (!strcmp(a->iface[i].name, name))
			return &a->iface[i];
	return NULL;
}

static struct iface *iface_at(struct agent *a, int ifindex)
{
	for (int i = 0; i < a->n_iface; i++)
		if (a->iface[i].ifindex == ifindex)
			return &a->iface[i];
	return NULL;
}

/* News of any interface: ours come, go, and change their names. */
static void on_link(void *arg, const struct link_news *l)
{
	struct agent *a = arg;
	struct iface *had = iface_at(a, l->ifindex), *is = l->gone ? NULL : iface_named(a, l->name);

	if (had && had != is) {
		note("%s is gone; waiting for it to come back", had->name);
		doors_detach(l->ifindex);
		had->ifindex = 0;
	}
	if (!is || is == had || !a->attach)
		return;
	if (is->ifindex) /* replaced by another of the same name */
		doors_detach(is->ifindex);
	is->ifindex = 0;
	if (doors_attach(l)) {
		if (strcmp(is->said, why))
			warn("%s", why);
		memcpy(is->said, why, sizeof(why));
		return;
	}
	is->ifindex = l->ifindex;
	is->said[0] = 0;
	note("attached to %s", is->name);
}

/* Doors of an earlier run on interfaces that are gone or no longer asked for. */
static void ifaces_tidy(struct agent *a)
{
	int left[64], n = doors_list(left, ARRAY_SIZE(left));

	for (int i = 0; i < n; i++)
		if (!iface_at(a, left[i]))
			doors_detach(left[i]);
}

static void ifaces_attach(struct agent *a)
{
	if (a->attach)
		return;
	a->attach = true;
	netlink_ask(a->netlink_fd);
}

/* --- sync -------------------------------------------------------------------- */
static bool all_synced(const struct model *m)
{
	for (int k = 0; k < N_KINDS; k++)
		if (!m->synced[k])
			return false;
	return true;
}

/* After each round of events. The first time: may it be programmed at all? */
static void sync_now(struct agent *a)
{
	if (a->refused || !all_synced(&a->model))
		return;
	if (!maps.adopted && model_check(&a->model)) {
		a->refused = true;
		return;
	}
	bool first = !maps.adopted, changed = maps_sync(&maps, &a->model);

	if (!changed && !first)
		return;
	a->status.synced = true;
	a->status.changed = time(NULL);
	status_write(a);
	if (first)
		note("%zu services and %zu slices from %s", a->model.services.n, a->model.slices.n,
		     a->status.source);
	ifaces_attach(a);
}

/* SIGHUP: --from is read anew; a bad file changes nothing. */
static void from_again(struct agent *a)
{
	if (!opt.from)
		return;
	if (!strcmp(opt.from, "-"))
		warn("stdin cannot be read again: SIGHUP does nothing");
	else if (from_read(&a->model, opt.from))
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

	return epoll_ctl(a->epoll_fd, EPOLL_CTL_ADD, fd, &e) ? fail("epoll: %s", strerror(errno)) : 0;
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
	a->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	a->signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	if (a->epoll_fd < 0 || a->signal_fd < 0)
		return fail("epoll: %s", strerror(errno));
	return loop_watch(a, a->signal_fd, WAKE_SIGNAL);
}

/* Waits for something and lets it happen. */
static void loop_round(struct agent *a)
{
	int64_t now = now_ms(), first = api_deadline(&a->api);
	struct epoll_event e[8];
	int n;

	first = maps.reap_at < first ? maps.reap_at : first;
	first = first - now < INT_MAX ? first - now : INT_MAX;
	n = epoll_wait(a->epoll_fd, e, ARRAY_SIZE(e), first == INT_MAX ? -1 : first > 0 ? first : 0);
	for (int i = 0; i < n; i++)
		if (e[i].data.u32 == WAKE_SIGNAL)
			on_signal(a);
		else if (e[i].data.u32 == WAKE_NETLINK) {
			if (netlink_read(a->netlink_fd, on_link, a) && a->attach)
				ifaces_tidy(a);
		} else
			api_ready(&a->api, &a->model, e[i].data.u32 - WAKE_API, e[i].events);
	now = now_ms();
	api_tick(&a->api, now);
	if (now >= maps.reap_at)
		maps_reap(&maps);
}

/* Where the objects come from: a file is read at once, a server is asked from
 * now on. `once`: the first failure ends it. 0, or -1 with why. */
static int source_open(struct agent *a, bool once)
{
	if (model_init(&a->model, &opt))
		return -1;
	if (opt.from) {
		snprintf(a->status.source, sizeof(a->status.source), "%s", opt.from);
		for (int k = 0; k < N_KINDS; k++)
			a->api.watch[k].deadline = INT64_MAX;
		return from_read(&a->model, opt.from);
	}
	a->api.once = once;
	if (api_open(&a->api))
		return -1;
	snprintf(a->status.source, sizeof(a->status.source), "%s", api_source(&a->api));
	api_start(&a->api, a->epoll_fd, WAKE_API);
	return 0;
}
/* === commands =============================================================
 * Each returns the exit code; a failure has been said. */
static int failed(void)
{
	warn("%s", why);
	return 1;
}

/* Whose lock on the pin directory it is, as far as the notes there tell. */
static int other_agent(void)
{
	struct tl_agent other = { 0 };
	uint32_t zero = 0;
	int fd = pinned("agent_map", 0);

	if (fd >= 0) {
		bpf_map_lookup_elem(fd, &zero, &other);
		close(fd);
	}
	return other.pid;
}

/* Everything up to the first event. 0; or -1 with why, and a directory with
 * nothing in it does not stay. */
static int agent_open_all(struct agent *a, int *pin_fd, bool once)
{
	struct tl_svc_key any;

	*pin_fd = pin_dir_open();
	if (*pin_fd < 0)
		return -1;
	if (!pin_dir_lock(*pin_fd))
		return fail("another tail_lifter (pid %d) is at work with %s; stop it first, or use another "
			    "--pin-dir", other_agent(), opt.pin_dir);
	if (loop_open(a) || datapath_load(&maps))
		return -1;
	a->netlink_fd = netlink_open();
	if (a->netlink_fd < 0 || loop_watch(a, a->netlink_fd, WAKE_NETLINK))
		return -1;
	a->status.pid = getpid();
	if (!bpf_map_get_next_key(maps.svc, NULL, &any)) /* the last good state of an earlier run */
		ifaces_attach(a);
	if (source_open(a, once))
		return -1;
	status_write(a);
	return 0;
}

static int agent_open(struct agent *a, int *pin_fd, bool once)
{
	int r = agent_open_all(a, pin_fd, once);

	if (r && *pin_fd >= 0)
		rmdir(opt.pin_dir);
	return r;
}

/* attach, sync, stay; the datapath stays when we go. */
static int cmd_run(void)
{
	int pin_fd;

	if (agent_open(&agent, &pin_fd, false))
		return failed();
	for (sync_now(&agent); !agent.stop && !agent.refused; sync_now(&agent))
		loop_round(&agent);
	api_stop(&agent.api);
	return agent.refused ? failed() : 0;
}

static bool all_attached(const struct agent *a)
{
	for (int i = 0; i < a->n_iface; i++)
		if (!a->iface[i].ifindex)
			return false;
	return true;
}

/* --once: attach and sync, or say why not. */
static int cmd_once(void)
{
	struct agent *a = &agent;
	int pin_fd;
	bool told = false; /* of all interfaces there are */

	if (agent_open(a, &pin_fd, true))
		return failed();
	for (sync_now(a); !a->stop && !a->refused && !a->api.failed && !maps.adopted; sync_now(a))
		loop_round(a);
	if (a->api.failed)
		fail("%s", a->api.failed);
	if (a->stop)
		fail("stopped before the first sync was complete");
	if (a->refused || a->api.failed || a->stop)
		return failed();
	fcntl(a->netlink_fd, F_SETFL, 0); /* the dump asked for by the sync: wait for its end */
	for (struct pollfd p = { .fd = a->netlink_fd, .events = POLLIN }; !told && poll(&p, 1, 5000) > 0;) {
		fcntl(a->netlink_fd, F_SETFL, O_NONBLOCK);
		told = netlink_read(a->netlink_fd, on_link, a);
	}
	for (int i = 0; i < a->n_iface; i++)
		if (!a->iface[i].ifindex && !a->iface[i].said[0])
			warn("there is no interface %s: is tailscaled running? --iface names another",
			     a->iface[i].name);
	ifaces_tidy(a);
	return all_attached(a) ? 0 : 1;
}

/* --dry-run: what would be programmed. */
static int cmd_dry_run(void)
{
	struct agent *a = &agent;
	struct buf out = { 0 };

	if (loop_open(a) || source_open(a, true))
		return failed();
	while (!all_synced(&a->model) && !a->api.failed && !a->stop)
		loop_round(a);
	if (!all_synced(&a->model))
		fail("%s", a->api.failed ? a->api.failed : "stopped");
	if (!all_synced(&a->model) || model_check(&a->model))
		return failed();
	model_settle(&a->model);
	print_dry_run(&out, &a->model, opt.json);
	fwrite(out.at, 1, out.len, stdout);
	return fflush(stdout) ? (fail("cannot write: %s", strerror(errno)), failed()) : 0;
}

/* --- status: everything out of the pinned maps -------------------------------- */
/* Descriptors of the pinned maps; -1 with why: there are none. */
static int maps_find(struct maps *m)
{
	struct {
		int *fd;
		const char *name;
	} all[] = { { &m->svc, "svc_map" }, { &m->set, "set_map" },	{ &m->text, "text_map" },
		    { &m->net, "net_map" }, { &m->ct, "ct_map" },	{ &m->stat, "stat_map" },
		    { &m->agent, "agent_map" } };

	for (size_t i = 0; i < ARRAY_SIZE(all); i++) {
		*all[i].fd = pinned(all[i].name, 0);
		if (*all[i].fd < 0 && errno == ENOENT)
			return fail("nothing of TailLifter is in %s: it was never started here, or was cleaned up",
				    opt.pin_dir);
		if (*all[i].fd < 0)
			return fail("cannot read %s/%s: %s; run as root", opt.pin_dir, all[i].name, strerror(errno));
	}
	return 0;
}

/* A text out of its pieces; to be freed. */
static char *text_find(const struct maps *m, uint64_t text)
{
	struct tl_text_key key = { .text = text };
	struct tl_text piece;
	struct buf out = { 0 };

	buf_add(&out, "", 0);
	while (text && !bpf_map_lookup_elem(m->text, &key, &piece)) {
		buf_add(&out, piece.at, strnlen(piece.at, sizeof(piece.at)));
		if (!piece.at[TL_TEXT - 1])
			break;
		key.piece++;
	}
	return out.at;
}

/* One frontend, and what it belongs to. */
struct found {
	struct tl_svc_key key;
	struct tl_svc svc;
	char *text; /* NAMESPACE/NAME/PORT/PROTOCOL, cut into `entry`'s strings */
	struct entry entry;
};

/* As CONTRACT sorts entries; frontends of one entry by address and port. */
static int found_order(const void *x, const void *y)
{
	const struct found *a = x, *b = y;
	int c = strcmp(a->entry.ns, b->entry.ns);

	c = c ? c : strcmp(a->entry.name, b->entry.name);
	c = c ? c : strcmp(a->entry.port, b->entry.port);
	c = c ? c : strcmp(proto_name(a->entry.proto), proto_name(b->entry.proto));
	c = c ? c : b->entry.v4 - a->entry.v4;
	c = c ? c : (int)a->entry.scope - (int)b->entry.scope;
	c = c ? c : memcmp(&a->key.addr, &b->key.addr, sizeof(a->key.addr));
	return c ? c : ntohs(a->key.port) - ntohs(b->key.port);
}

static bool same_entry(const struct found *a, const struct found *b)
{
	return a->svc.name == b->svc.name && a->entry.v4 == b->entry.v4 && a->entry.scope == b->entry.scope;
}

static bool found_read(const struct maps *m, const struct tl_svc_key *key, struct found *f)
{
	char *name, *port, *proto;

	*f = (struct found){ .key = *key };
	if (!key->port || bpf_map_lookup_elem(m->svc, key, &f->svc))
		return false;
	f->text = text_find(m, f->svc.name);
	name = strchr(f->text, '/');
	port = name ? strchr(name + 1, '/') : NULL;
	proto = port ? strchr(port + 1, '/') : NULL;
	if (!proto) {
		free(f->text);
		return false;
	}
	*name++ = *port++ = *proto++ = 0;
	f->entry = (struct entry){
		.ns = f->text, .name = name, .port = port, .proto = key->proto,
		.v4 = addr_is_v4((const struct in6_addr *)&key->addr),
		.scope = f->svc.flags & TL_SVC_SCOPE,
		.drop_if_empty = f->svc.flags & TL_SVC_DROP_IF_EMPTY,
		.affinity = f->svc.affinity,
	};
	return true;
}

static void entry_add_backends(const struct maps *m, const struct found *f, struct entry *e)
{
	struct tl_set_key key = { .set = f->svc.set };
	struct tl_chunk chunk;

	e->backends = mem(NULL, f->svc.n_backends * sizeof(*e->backends));
	for (uint32_t i = 0; i < f->svc.n_backends; i++) {
		const struct tl_backend *b = &chunk.at[i % TL_CHUNK];
		struct backend *to = &e->backends[e->n_backends];

		key.chunk = i / TL_CHUNK;
		if (i % TL_CHUNK == 0 && bpf_map_lookup_elem(m->set, &key, &chunk))
			return;
		memcpy(&to->addr, &b->addr, sizeof(to->addr));
		to->port = ntohs(b->port);
		to->local = b->flags & TL_BACKEND_LOCAL;
		to->node = text_find(m, b->node);
		e->n_backends++;
	}
}

static int range_order(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct cidr));
}

static void entry_add_sources(const struct maps *m, const struct found *f, struct entry *e)
{
	uint32_t scope[2] = { f->svc.name, f->svc.name >> 32 };
	struct tl_net_key key, *before = NULL;
	struct buf out = { 0 };

	for (; !bpf_map_get_next_key(m->net, before, &key); before = &key) {
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

/* All entries that the datapath has, sorted; only those of `only` (NAMESPACE/NAME)
 * unless that is NULL. Memory is left to the end of the process. */
static struct entry *status_entries(const struct maps *m, const char *only, int *n)
{
	struct tl_svc_key key, *before = NULL;
	struct buf found = { 0 }, out = { 0 };
	struct found f, *at;
	struct entry *e = NULL;
	char name[600];

	for (; !bpf_map_get_next_key(m->svc, before, &key); before = &key)
		if (found_read(m, &key, &f)) {
			snprintf(name, sizeof(name), "%s/%s", f.entry.ns, f.entry.name);
			if (!only || !strcmp(only, name))
				buf_add(&found, &f, sizeof(f));
		}
	at = (struct found *)found.at;
	*n = found.len / sizeof(f);
	if (*n)
		qsort(at, *n, sizeof(f), found_order);
	buf_room(&out, *n * sizeof(*e)); /* entries do not move from here on */
	for (int i = 0; i < *n; i++) {
		struct frontend front = { .port = ntohs(at[i].key.port) };

		memcpy(&front.addr, &at[i].key.addr, sizeof(front.addr));
		if (!i || !same_entry(&at[i - 1], &at[i])) {
			buf_add(&out, &at[i].entry, sizeof(*e));
			e = (struct entry *)(out.at + out.len) - 1;
			e->frontends = mem(NULL, *n * sizeof(front));
			entry_add_backends(m, &at[i], e);
			if (at[i].svc.flags & TL_SVC_SOURCES)
				entry_add_sources(m, &at[i], e);
		}
		e->frontends[e->n_frontends++] = front;
	}
	*n = out.len / sizeof(*e);
	return (struct entry *)out.at;
}

static const struct {
	const char *key, *text;
} reasons[TL_N_REASONS] = {
#define ROW(name, key, fate, text) { key, text },
	TL_REASONS(ROW)
#undef ROW
};

static uint64_t counter(const struct maps *m, uint32_t reason)
{
	int cpus = libbpf_num_possible_cpus();
	uint64_t *each = mem(NULL, cpus * sizeof(*each)), sum = 0;

	if (!bpf_map_lookup_elem(m->stat, &reason, each))
		for (int i = 0; i < cpus; i++)
			sum += each[i];
	free(each);
	return sum;
}

static void flow_count(void *arg, const struct tl_tuple *t, const struct tl_flow *f)
{
	(void)f;
	*(uint64_t *)arg += t->dir == TL_REQUEST;
}

struct door {
	int ifindex;
	char name[IF_NAMESIZE];
	const char *link, *hook;
};

static bool door_read(int ifindex, struct door *d)
{
	struct bpf_link_info link;
	struct ifreq dev = { 0 };
	int fd = pinned("from", ifindex), any;

	*d = (struct door){ .ifindex = ifindex };
	if (fd < 0 || !if_indextoname(ifindex, d->name))
		return false;
	d->hook = is_tcx_link(fd, &link) ? "tcx" : "clsact";
	close(fd);
	any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	memcpy(dev.ifr_name, d->name, IF_NAMESIZE);
	if (any >= 0 && !ioctl(any, SIOCGIFHWADDR, &dev))
		d->link = is_ethernet(dev.ifr_hwaddr.sa_family) ? "l2" : "l3";
	else
		d->link = "";
	close(any);
	return true;
}

static void print_time(struct buf *out, uint64_t seconds)
{
	time_t t = seconds;
	char text[32] = "";

	if (seconds)
		strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", gmtime(&t));
	buf_printf(out, "%s", text);
}

/* What --status shows besides the services. */
struct overview {
	struct tl_agent agent;
	bool running;
	uint64_t flows;
	uint32_t capacity;
	struct door doors[64];
	int n_doors;
};

static void overview_read(const struct maps *m, struct overview *o)
{
	struct bpf_map_info info = { 0 };
	uint32_t zero = 0, len = sizeof(info);
	int fd = open(opt.pin_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), index[64];
	int n = doors_list(index, ARRAY_SIZE(index));

	memset(o, 0, sizeof(*o));
	o->running = fd >= 0 && pin_dir_locked(fd);
	if (fd >= 0)
		close(fd);
	bpf_map_lookup_elem(m->agent, &zero, &o->agent);
	bpf_map_get_info_by_fd(m->ct, &info, &len);
	o->capacity = info.max_entries;
	flows_walk(m->ct, flow_count, &o->flows);
	for (int i = 0; i < n; i++)
		o->n_doors += door_read(index[i], &o->doors[o->n_doors]);
}

static void print_status_json(struct buf *out, const struct maps *m, const struct overview *o,
			      const struct entry *e, int n)
{
	buf_printf(out, "{\"node\":");
	print_string(out, o->agent.node);
	buf_printf(out, ",\"zone\":");
	print_string(out, o->agent.zone);
	buf_printf(out, ",\"services\":[");
	print_entries_json(out, e, n, true);
	buf_printf(out, "],\n\"agent\":{\"running\":%s,\"pid\":%u,\"source\":", o->running ? "true" : "false",
		   o->running ? o->agent.pid : 0);
	print_string(out, o->agent.source);
	buf_printf(out, ",\"synced\":%s,\"last_change\":\"", o->agent.synced ? "true" : "false");
	print_time(out, o->agent.changed);
	buf_printf(out, "\"},\n\"interfaces\":[");
	for (int i = 0; i < o->n_doors; i++)
		buf_printf(out, "%s{\"name\":\"%s\",\"ifindex\":%d,\"link\":\"%s\",\"hook\":\"%s\"}", i ? "," : "",
			   o->doors[i].name, o->doors[i].ifindex, o->doors[i].link, o->doors[i].hook);
	buf_printf(out, "],\n\"flows\":{\"count\":%" PRIu64 ",\"capacity\":%u},\n\"counters\":{", o->flows,
		   o->capacity);
	for (int i = 0; i < TL_N_REASONS; i++)
		buf_printf(out, "%s\"%s\":%" PRIu64, i ? "," : "", reasons[i].key, counter(m, i));
	buf_printf(out, "}}\n");
}

static void print_status_text(struct buf *out, const struct maps *m, const struct overview *o,
			      const struct entry *e, int n)
{
	buf_printf(out, "agent: %s", o->running ? "running" : "not running; the datapath works without it");
	if (o->running)
		buf_printf(out, ", pid %u", o->agent.pid);
	buf_printf(out, "\n  source: %s%s\n  last change: ", o->agent.source,
		   o->agent.synced ? "" : " (not synced yet)");
	print_time(out, o->agent.changed);
	buf_printf(out, "\n  node: %s%s%s\n", o->agent.node, *o->agent.zone ? ", zone " : "", o->agent.zone);
	for (int i = 0; i < o->n_doors; i++)
		buf_printf(out, "\ninterface: %s\n  link: %s\n  hook: %s\n", o->doors[i].name,
			   !strcmp(o->doors[i].link, "l2") ? "Ethernet" : "bare IP", o->doors[i].hook);
	if (!o->n_doors)
		buf_printf(out, "\ninterface: (none attached)\n");
	print_entries_text(out, e, n);
	buf_printf(out, "\nflows: %" PRIu64 " of at most %u\n", o->flows, o->capacity / 2);
	for (int i = 0; i < TL_N_REASONS; i++) {
		uint64_t count = counter(m, i);

		if (count)
			buf_printf(out, "%12" PRIu64 "  %s\n", count, reasons[i].text);
	}
}

static int cmd_status(void)
{
	static struct overview o;
	struct buf out = { 0 };
	struct entry *e;
	int n;

	if (maps_find(&maps))
		return failed();
	overview_read(&maps, &o);
	e = status_entries(&maps, opt.status_of, &n);
	if (opt.status_of && !n) {
		fail("no service %s is served here", opt.status_of);
		return failed();
	}
	if (opt.json)
		print_status_json(&out, &maps, &o, e, n);
	else
		print_status_text(&out, &maps, &o, e, n);
	fwrite(out.at, 1, out.len, stdout);
	return fflush(stdout) ? (fail("cannot write: %s", strerror(errno)), failed()) : 0;
}

/* --- cleanup ------------------------------------------------------------------ */
/* Tells a running agent to stop, and waits until it has. 0, or -1 with why. */
static int stop_agent(int pin_fd)
{
	int pid = 0;

	for (int tries = 0; pin_dir_locked(pin_fd); tries++) {
		if (!pid && (pid = other_agent()) > 0 && kill(pid, SIGTERM) && errno != ESRCH)
			return fail("cannot stop the agent (pid %d): %s", pid, strerror(errno));
		if (tries == 100)
			return fail("the agent (pid %d) still runs after 5 s: stop it (kubectl delete -f "
				    "k3s/tail-lifter.yaml, systemctl stop tail-lifter), then try again", pid);
		usleep(50000);
	}
	return 0;
}

/* The bpffs goes too if it was us who mounted it, and nothing else is in it. */
static void unmount_ours(void)
{
	FILE *f = fopen("/proc/self/mounts", "re");
	char line[PATH_MAX];

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, MOUNT_NAME " " BPFFS " ", strlen(MOUNT_NAME " " BPFFS " "))) {
			DIR *dir = opendir(BPFFS);
			struct dirent *d;
			bool empty = dir;

			while (dir && (d = readdir(dir)))
				empty &= d->d_name[0] == '.';
			if (dir)
				closedir(dir);
			if (empty)
				umount(BPFFS);
			break;
		}
	if (f)
		fclose(f);
}

/* Leaves no trace. Nothing there is fine. */
static int cmd_cleanup(void)
{
	int index[64], n, pin_fd = open(opt.pin_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char path[PATH_MAX + 256];
	struct dirent *d;
	DIR *dir;

	if (pin_fd < 0 && errno == ENOENT)
		return unmount_ours(), 0;
	if (pin_fd < 0 || !is_bpffs(opt.pin_dir)) {
		fail("cannot clean up %s: %s", opt.pin_dir, pin_fd < 0 ? strerror(errno) : "it is in no bpffs");
		return failed();
	}
	if (stop_agent(pin_fd))
		return failed();
	for (int tries = 0; tries < 8 && (n = doors_list(index, ARRAY_SIZE(index))) > 0; tries++) /* doors first */
		for (int i = 0; i < n; i++)
			doors_detach(index[i]);
	dir = opendir(opt.pin_dir);
	while (dir && (d = readdir(dir))) {
		snprintf(path, sizeof(path), "%s/%s", opt.pin_dir, d->d_name);
		if (d->d_name[0] != '.' && unlink(path) && errno == EPERM)
			break;
	}
	if (dir)
		closedir(dir);
	close(pin_fd);
	if (rmdir(opt.pin_dir)) {
		fail("cannot remove %s: %s; run as root", opt.pin_dir, strerror(errno));
		return failed();
	}
	unmount_ours();
	return 0;
}
/* === options ==============================================================
 * One table: parsing, --help and the README's table come from it. */
enum option_id {
	OPT_IFACE, OPT_KUBECONFIG, OPT_FROM, OPT_NODE, OPT_SELECTOR, OPT_NAMESPACE, OPT_VIP_RANGE, OPT_MAP,
	OPT_SNAT, OPT_FAST, OPT_FLOWS, OPT_ADVERTISE, OPT_METRICS, OPT_PIN_DIR, OPT_OUTPUT, OPT_VERBOSE,
	OPT_QUIET, OPT_ONCE, OPT_STATUS, OPT_CHECK, OPT_DRY_RUN, OPT_CLEANUP, OPT_VERSION, OPT_HELP,
};

static const struct option_row {
	char letter;
	const char *name, *value; /* value: its name in the help, NULL: it takes none */
	const char *env, *text;
} options[] = {
	[OPT_ONCE] = { 0, "once", NULL, NULL, "attach, sync once, exit; the datapath stays" },
	[OPT_STATUS] = { 0, "status", NULL, NULL, "what is attached, services, flows, counters; of one service: --status NAMESPACE/NAME" },
	[OPT_CHECK] = { 0, "check", NULL, NULL, "what would keep it from working here, with the remedy" },
	[OPT_DRY_RUN] = { 0, "dry-run", NULL, NULL, "print what would be programmed" },
	[OPT_CLEANUP] = { 0, "cleanup", NULL, NULL, "detach, unpin, leave no trace" },
	[OPT_VERSION] = { 0, "version", NULL, NULL, "print the version" },
	[OPT_HELP] = { 'h', "help", NULL, NULL, "print this" },
	[OPT_IFACE] = { 'i', "iface", "NAME[,NAME]", "IFACE", "VPN interfaces (default tailscale0); need not exist yet" },
	[OPT_KUBECONFIG] = { 0, "kubeconfig", "FILE", "KUBECONFIG", "default: in-cluster, else k3s's, RKE2's, ~/.kube/config" },
	[OPT_FROM] = { 0, "from", "FILE", NULL, "read objects as JSON (- is stdin) instead of an API server; again on SIGHUP" },
	[OPT_NODE] = { 0, "node", "NAME", "NODE_NAME", "own node (default: the host name)" },
	[OPT_SELECTOR] = { 0, "selector", "SEL", NULL, "serve only services with these labels, as kubectl -l" },
	[OPT_NAMESPACE] = { 'n', "namespace", "NS", NULL, "serve only services of this namespace; may be repeated" },
	[OPT_VIP_RANGE] = { 0, "vip-range", "CIDR", NULL, "also give each service an address in this range" },
	[OPT_MAP] = { 0, "map", "FROM=TO", NULL, "also serve the ClusterIPs of range TO at range FROM; may be repeated" },
	[OPT_SNAT] = { 0, "snat", "off|auto|on", NULL, "source NAT towards backends (default off)" },
	[OPT_FAST] = { 0, "fast", NULL, NULL, "local backends skip the host's stack" },
	[OPT_FLOWS] = { 0, "flows", "N", NULL, "capacity of ct_map (default 65536)" },
	[OPT_ADVERTISE] = { 0, "advertise", NULL, NULL, "keep the service CIDR among tailscaled's advertised routes" },
	[OPT_METRICS] = { 0, "metrics", "ADDR:PORT", NULL, "serve Prometheus metrics and health there" },
	[OPT_PIN_DIR] = { 0, "pin-dir", "DIR", NULL, "where maps are pinned (default /sys/fs/bpf/tail_lifter)" },
	[OPT_OUTPUT] = { 'o', "output", "json", NULL, "print JSON (--status, --dry-run)" },
	[OPT_VERBOSE] = { 'v', "verbose", NULL, NULL, "say more" },
	[OPT_QUIET] = { 'q', "quiet", NULL, NULL, "say less" },
};

static int cmd_help(void);

static int cmd_version(void)
{
	printf("tail_lifter %s\n", TAIL_LIFTER_VERSION);
	return 0;
}

static int cmd_check(void)
{
	fail("--check is not in this version");
	return failed();
}

/* What the command line may ask for, besides to run. */
static int (*const commands[])(void) = {
	[OPT_ONCE] = cmd_once,	     [OPT_STATUS] = cmd_status,	  [OPT_CHECK] = cmd_check, [OPT_DRY_RUN] = cmd_dry_run,
	[OPT_CLEANUP] = cmd_cleanup, [OPT_VERSION] = cmd_version, [OPT_HELP] = cmd_help,
};

/* As in the design: commands, then options. */
static int cmd_help(void)
{
	printf("tail_lifter: every ClusterIP reachable from the tailnet\n\n"
	       "usage: tail_lifter [OPTIONS]   attach, sync, stay; SIGTERM leaves the datapath working\n"
	       "       tail_lifter COMMAND [OPTIONS]\n");
	for (int commands_first = 1; commands_first >= 0; commands_first--) {
		printf("\n%s:\n", commands_first ? "commands" : "options");
		for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
			const struct option_row *o = &options[i];
			char left[64];

			if ((i < ARRAY_SIZE(commands) && commands[i]) != commands_first)
				continue;
			snprintf(left, sizeof(left), "%c%c%c --%s%s%s", o->letter ? '-' : ' ',
				 o->letter ? o->letter : ' ', o->letter ? ',' : ' ', o->name, o->value ? " " : "",
				 o->value ? o->value : "");
			printf("  %-26s  %s%s%s%s\n", left, o->text, o->env ? "; env " : "",
			       o->env ? o->env : "", "");
		}
	}
	return fflush(stdout) ? 1 : 0;
}

static int take_cidr(const char *name, const char *s, size_t n, struct cidr *c)
{
	struct in6_addr masked;

	if (!cidr_parse(s, n, c))
		return fail("--%s: %.*s is no range like 10.8.43.0/24", name, (int)n, s);
	masked = c->addr;
	addr_mask(&masked, c->bits);
	if (memcmp(&masked, &c->addr, sizeof(masked)))
		return fail("--%s: %.*s has bits set behind its length", name, (int)n, s);
	return 0;
}

static int take_map(const char *s)
{
	const char *eq = strchr(s, '=');
	struct map_option m;

	if (!eq)
		return fail("--map: %s is not FROM=TO", s);
	if (take_cidr("map", s, eq - s, &m.from) || take_cidr("map", eq + 1, strlen(eq + 1), &m.to))
		return -1;
	if (m.from.bits != m.to.bits || addr_is_v4(&m.from.addr) != addr_is_v4(&m.to.addr))
		return fail("--map: %s: both ranges must be of one family and length", s);
	opt.maps = mem(opt.maps, (opt.n_maps + 1) * sizeof(m));
	opt.maps[opt.n_maps++] = m;
	return 0;
}

static int take_ifaces(const char *s)
{
	agent.n_iface = 0;
	while (*s) {
		size_t n = strcspn(s, ",");

		if (!n || n >= IF_NAMESIZE || memchr(s, '/', n) || memchr(s, ' ', n) || agent.n_iface == MAX_IFACES)
			return fail("--iface: %s: up to %d names of at most %d characters, with commas between", s,
				    MAX_IFACES, IF_NAMESIZE - 1);
		memset(&agent.iface[agent.n_iface], 0, sizeof(agent.iface[0]));
		memcpy(agent.iface[agent.n_iface++].name, s, n);
		s += n + (s[n] == ',');
		if (s[-1] == ',' && !*s)
			return fail("--iface: a name must follow the comma");
	}
	return agent.n_iface ? 0 : fail("--iface: a name is missing");
}

static int take_flows(const char *s)
{
	char *end;
	unsigned long n = strtoul(s, &end, 10);

	if (!isdigit((unsigned char)*s) || *end || n < 1024 || n > 16 << 20)
		return fail("--flows: %s is not a number from 1024 to %d", s, 16 << 20);
	opt.flows = n;
	return 0;
}

static int take_snat(const char *s)
{
	static const char *const names[] = { "off", "auto", "on" };

	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		if (!strcmp(s, names[i]))
			return opt.snat = i, 0;
	return fail("--snat: %s is not off, auto or on", s);
}

/* One option. 0; -1 with why: its value does not fit. */
static int take(enum option_id id, const char *value)
{
	switch (id) {
	case OPT_IFACE:
		return take_ifaces(value);
	case OPT_KUBECONFIG:
		opt.kubeconfig = value;
		return *value ? 0 : fail("--kubeconfig: a file is missing");
	case OPT_FROM:
		opt.from = value;
		return *value ? 0 : fail("--from: a file is missing");
	case OPT_NODE:
		opt.node = value;
		return *value && strlen(value) <= MAX_NAME ? 0 : fail("--node: not a node's name");
	case OPT_SELECTOR:
		opt.selector = value;
		return 0;
	case OPT_NAMESPACE:
		opt.namespaces = mem(opt.namespaces, (opt.n_namespaces + 1) * sizeof(value));
		opt.namespaces[opt.n_namespaces++] = value;
		return *value ? 0 : fail("--namespace: a name is missing");
	case OPT_VIP_RANGE:
		opt.has_vip_range = true;
		return take_cidr("vip-range", value, strlen(value), &opt.vip_range);
	case OPT_MAP:
		return take_map(value);
	case OPT_SNAT:
		return take_snat(value);
	case OPT_FLOWS:
		return take_flows(value);
	case OPT_FAST:
		opt.fast = true;
		return 0;
	case OPT_ADVERTISE:
		opt.advertise = true;
		return 0;
	case OPT_METRICS:
		opt.metrics = value;
		return strrchr(value, ':') ? 0 : fail("--metrics: %s is not ADDR:PORT", value);
	case OPT_PIN_DIR:
		opt.pin_dir = value;
		return *value == '/' ? 0 : fail("--pin-dir: %s is not an absolute path", value);
	case OPT_OUTPUT:
		opt.json = true;
		return !strcmp(value, "json") ? 0 : fail("--output: %s is not json", value);
	case OPT_VERBOSE:
		loud++;
		return 0;
	case OPT_QUIET:
		loud--;
		return 0;
	default:
		return 0;
	}
}

/* Finds the option of an argument: --name, --name=value, -x, -xvalue. `*value` is
 * what is attached to it, NULL: nothing. -1 with why. */
static int option_of(const char *arg, const char **value)
{
	size_t n = arg[1] == '-' ? strcspn(arg + 2, "=") : 1;
	const char *rest = arg[1] == '-' ? arg + 2 + n : arg + 2;

	for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
		const struct option_row *o = &options[i];

		if (arg[1] == '-' ? strlen(o->name) != n || strncmp(o->name, arg + 2, n) : o->letter != arg[1])
			continue;
		*value = !*rest ? NULL : arg[1] == '-' ? rest + 1 : rest;
		if (*value && !o->value && (arg[1] == '-' || rest[0]))
			return fail("--%s takes no value", o->name);
		return i;
	}
	return fail("unknown option %s", arg);
}

/* Fills opt from the environment and argv; `*command` is what to do. 0, or -1
 * with why. */
static int options_read(int argc, char **argv, int (**command)(void))
{
	static char host[MAX_NAME + 1];
	const char *value, *chosen = NULL;

	opt = (struct options){ .flows = TL_FLOWS, .pin_dir = BPFFS "/tail_lifter" };
	*command = cmd_run;
	take_ifaces("tailscale0");
	for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
		value = options[i].env ? getenv(options[i].env) : NULL;
		if (value && *value && take(i, value))
			return -1;
	}
	for (int i = 1; i < argc; i++) {
		int id;

		if (argv[i][0] != '-' || !argv[i][1]) {
			if (*command != cmd_status || opt.status_of || !strchr(argv[i], '/'))
				return fail("stray word %s", argv[i]);
			opt.status_of = argv[i];
			continue;
		}
		id = option_of(argv[i], &value);
		if (id < 0)
			return -1;
		if (options[id].value && !value && !(value = argv[++i]))
			return fail("--%s: %s is missing", options[id].name, options[id].value);
		if (id < (int)ARRAY_SIZE(commands) && commands[id]) {
			if (chosen && strcmp(chosen, options[id].name))
				return fail("--%s and --%s are two commands", chosen, options[id].name);
			chosen = options[id].name;
			*command = commands[id];
		}
		if (take(id, value))
			return -1;
	}
	if (!opt.node) {
		gethostname(host, sizeof(host) - 1);
		for (char *c = host; *c; c++)
			*c = tolower((unsigned char)*c);
		opt.node = host;
	}
	return 0;
}

/* What this version knows the words for, and does not do. */
static int options_unbuilt(void)
{
	const char *word = opt.fast ? "--fast" : opt.advertise ? "--advertise" : opt.metrics ? "--metrics" :
			   opt.snat ? "--snat other than off" : NULL;

	return word ? fail("%s is not in this version", word) : 0;
}

/* === main ================================================================= */
/* What is constant once the program is relocated becomes read-only. A dynamic
 * loader would have done this; a static-pie has none. */
static void protect_relro(void)
{
	const ElfW(Phdr) *at = (const ElfW(Phdr) *)getauxval(AT_PHDR), *end = at + getauxval(AT_PHNUM);
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
	int (*command)(void);

	protect_relro();

	if (options_read(argc, argv, &command) || (model_init(&agent.model, &opt) && command != cmd_help)) {
		warn("%s; usage: tail_lifter [COMMAND] [OPTIONS], --help lists them", why);
		return 2;
	}
	libbpf_set_print(on_libbpf);
	if (options_unbuilt())
		return failed();
	return command();
}
