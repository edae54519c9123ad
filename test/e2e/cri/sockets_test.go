//go:build e2e

package cri

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// listen is what this program does in a pod: it says hello to who connects to a unix socket.
func listen(path string) int {
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o777)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("listening")
	for {
		conn, err := l.Accept()
		if err != nil {
			fmt.Println(err)
			return 1
		}
		io.WriteString(conn, "hello\n")
		conn.Close()
	}
}

// dial prints what there is to be read from a unix socket.
func dial(path string) int {
	conn, err := net.Dial("unix", path)
	if err == nil {
		_, err = io.Copy(os.Stdout, conn)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Containers of a pod meet in the unix sockets and FIFOs of a volume, whichever of them was there first. One that may only read
// an emptyDir connects, too.
func TestSocketOnVolume(t *testing.T) {
	n := pods.For(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	config := n.PodConfig(t)
	root := t.TempDir()
	directory, emptyDir := filepath.Join(root, "directory"), filepath.Join(root, "pods", config.Metadata.Uid, "volumes/kubernetes.io~empty-dir/v")
	for _, dir := range []string{directory, emptyDir} {
		if err := os.MkdirAll(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	p, err := n.TryPod(t, config)
	if err != nil {
		t.Fatal(err)
	}
	program := pods.Mount(self, "/self", pods.ReadOnly)
	first := p.Run(t, program, pods.Mount(directory, "/d"), pods.Mount(emptyDir, "/e", pods.ReadOnly))
	for _, volume := range []string{"/d", "/e"} {
		server := p.Run(t, program, pods.Mount(directory, "/d"), pods.Mount(emptyDir, "/e"), pods.Command("/self", "listen", volume+"/socket"))
		node.Until(t, "the server listens", func() bool { stdout, _ := server.Output(t); return stdout == "listening\n" })
		first.Exec(t, "/self", "dial", volume+"/socket").WantOutput(t, "hello\n")
		server.Get(t, "mkfifo "+volume+"/fifo; { echo through >"+volume+"/fifo; } >/dev/null 2>&1 &")
		first.Exec(t, "cat", volume+"/fifo").WantOutput(t, "through\n")
		server.Stop(t, 0)
		server.Remove(t)
		if r := first.Shell(t, "/self dial "+volume+"/socket"); r.Code != 1 {
			t.Errorf("dial when the server has gone: %s", r)
		}
	}
	first.Shell(t, "echo >/e/new").WantExit(t, 1)
}
