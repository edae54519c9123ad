//go:build privileged

package shim

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// podNamespace makes a network namespace with a veth pair in it, one end of
// which is the pod's.
func podNamespace(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "other"}); err != nil {
				return err
			}
			for _, name := range []string{"lo", "eth0"} {
				link, err := netlink.LinkByName(name)
				if err != nil {
					return err
				}
				if err := netlink.LinkSetUp(link); err != nil {
					return err
				}
			}
			return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return path
}

// inside does something in a namespace.
func inside(t *testing.T, path string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			ns, err := os.Open(path)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// joined says what the shim has in a namespace.
func joined(t *testing.T, path string) (taps, qdiscs int) {
	t.Helper()
	inside(t, path, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "mvtap") {
				taps++
			}
			list, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range list {
				if q.Type() == "clsact" {
					qdiscs++
				}
			}
		}
		return nil
	})
	return taps, qdiscs
}

// enterNamespace changes a bundle.
func enterNamespace(t *testing.T, bundle, path string) {
	t.Helper()
	editSpec(t, bundle, func(spec *specs.Spec) {
		for i := range spec.Linux.Namespaces {
			if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				spec.Linux.Namespaces[i].Path = path
			}
		}
	})
}

// The namespace of a pod is left as it was, by the shim or, if that was killed,
// by delete. Between the two, ports are forwarded.
func TestNamespaceOfAPod(t *testing.T) {
	ns := podNamespace(t)
	for _, killed := range []bool{false, true} {
		n := newNode(t)
		bundle := n.bundle("c1", nil)
		enterNamespace(t, bundle, ns)
		task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
		run(t, task, "c1", bundle)
		// The tap went with its descriptors, which the fake machine has not
		// taken.
		if taps, qdiscs := joined(t, ns); taps != 0 || qdiscs != 1 {
			t.Errorf("%d taps, %d queueing disciplines", taps, qdiscs)
		}
		inside(t, ns, func() error {
			conn, err := net.Dial("tcp4", "localhost:7")
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "hello"); err != nil {
				return err
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			if got, err := io.ReadAll(conn); string(got) != "hello" {
				t.Errorf("forwarded: %q, %v", got, err)
			}
			return nil
		})
		if killed {
			n.killShim()
		} else {
			task.Kill(context.Background(), &taskv3.KillRequest{ID: "c1", Signal: 9})
			task.Wait(context.Background(), &taskv3.WaitRequest{ID: "c1"})
		}
		n.delete("c1", bundle)
		if taps, qdiscs := joined(t, ns); taps != 0 || qdiscs != 0 {
			t.Errorf("killed %v: %d taps and %d queueing disciplines are left", killed, taps, qdiscs)
		}
	}
}

func TestHostsNamespace(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	enterNamespace(t, bundle, "/proc/thread-self/ns/net") // the shim is in the host's
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	_, err := task.Create(context.Background(), &taskv3.CreateTaskRequest{ID: "c1", Bundle: bundle})
	if err == nil || !strings.Contains(err.Error(), "hostNetwork") {
		t.Errorf("create: %v", err)
	}
	n.delete("c1", bundle)
}
