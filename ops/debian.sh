# shellcheck shell=bash
# Sourced after setup.sh by the scripts that make whole Debian systems: a bare one, and this machine's settings for it.

# bare_debian: prints the archive of a bare Debian 12, made once with debootstrap and kept in the cache.
bare_debian() {
	local cache=${MUSTER_CACHE:-$HOME/.cache/muster}/fresh folder
	mkdir -p "$cache"
	exec 8>"$cache/base.lock"
	flock 8
	if [[ ! -e $cache/base.tar ]]; then
		rm -rf "$cache"/base.??????
		folder=$(mktemp -d "$cache/base.XXXXXX")
		say "making a bare Debian 12 (once)" >&2
		debootstrap --variant=minbase bookworm "$folder" >"$cache/debootstrap.log" 2>&1 ||
			{ tail "$cache/debootstrap.log" >&2 && die "debootstrap failed; all it said is in $cache/debootstrap.log"; }
		tar -C "$folder" -cf "$cache/base.tar.new" .
		mv "$cache/base.tar.new" "$cache/base.tar"
		rm -rf "$folder"
	fi
	exec 8>&-
	echo "$cache/base.tar"
}

copy_settings() { # ROOT: apt, pip, certificates, names
	local root=$1 path
	rm -f "$root/etc/apt/sources.list" # of debootstrap; this machine's own say it all
	for path in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d /etc/apt/auth.conf.d /etc/apt/trusted.gpg.d \
		/etc/apt/preferences.d /etc/apt/keyrings /etc/pip.conf /root/.config/pip /root/.pip /etc/ssl/certs \
		/usr/local/share/ca-certificates /etc/hosts /etc/resolv.conf; do
		[[ -e $path ]] || continue
		rm -rf "${root:?}$path"
		mkdir -p "$(dirname "$root$path")"
		cp -aL "$path" "$root$path" 2>/dev/null || true # a certificate's link may lead nowhere
	done
}

# clean_environment: sets clean_words to an environment of nothing but what packages need to be fetched.
clean_environment() {
	local name
	clean_words=("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" LANG=C.UTF-8 "TERM=${TERM:-dumb}" HOME=/root)
	for name in $(compgen -e); do
		case $name in
		PIP_FIND_LINKS) ;;
		PIP_* | *_proxy | *_PROXY | SSL_CERT_FILE | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE) clean_words+=("$name=${!name}") ;;
		esac
	done
}
