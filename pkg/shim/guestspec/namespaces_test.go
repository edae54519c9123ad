package guestspec

import (
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// A container without a uts namespace of its own sets the domain name of the guest's, whether it is the first one or not:
// what runc does in a namespace that is shared.
func TestDomainname(t *testing.T) {
	const key = "kernel.domainname"
	long := strings.Repeat("d", 65)
	for _, test := range []struct {
		name, set, path, sysctl string
		in                      Input
		domainname              string
		want                    map[string]string
	}{
		{name: "the first container", set: "example.org", in: first, want: map[string]string{key: "example.org"}},
		{name: "none", in: first},
		{name: "as long as the kernel has it", set: long[1:], in: first, want: map[string]string{key: long[1:]}},
		{name: "a sysctl says more", set: "example.org", sysctl: key, in: first, want: map[string]string{key: "other.org"}},
		{name: "a sysctl with slashes", set: "example.org", sysctl: "kernel/domainname", in: first, want: map[string]string{"kernel/domainname": "other.org"}},
		{name: "one that joins", set: "example.org", path: "/proc/7/ns/uts", in: Input{ID: "c1", Tasks: map[uint32]string{7: ""}},
			want: map[string]string{key: "example.org"}},
		{name: "one of its own", set: "example.org", in: Input{ID: "c1"}, domainname: "example.org"},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := base()
			spec.Domainname = test.set
			spec.Linux.Namespaces[2].Path = test.path
			if test.sysctl != "" {
				spec.Linux.Sysctl = map[string]string{test.sysctl: "other.org"}
			}
			pod, err := ReadSandbox(spec)
			if err != nil {
				t.Fatal(err)
			}
			r := rewrite(t, spec, test.in)
			if r.Spec.Domainname != test.domainname || !maps.Equal(r.Spec.Linux.Sysctl, test.want) {
				t.Errorf("domain name %q, sysctls %v; want %q, %v", r.Spec.Domainname, r.Spec.Linux.Sysctl, test.domainname, test.want)
			}
			if test.in.First && !maps.Equal(pod.Sysctls, test.want) {
				t.Errorf("sysctls of a pod %v, want %v", pod.Sysctls, test.want)
			}
		})
	}
	// The kernel would cut these off.
	for _, name := range []string{long, "a\nb", "a\x00b"} {
		spec := base()
		spec.Domainname = name
		if _, err := ReadSandbox(spec); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q of a pod: %v", name, err)
		}
		if _, err := Rewrite(spec, first); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q of a container: %v", name, err)
		}
	}
}
