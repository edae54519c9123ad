// Command registry runs a program beside a container registry in memory that has the images a suite of tests pulls, and ends with
// that program's exit code. containerd is told to resolve every registry name to it, so that the names which the suite has
// as constants work without a network.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	layers := flag.String("layers", "", "directory of the images' layers, as hack/images/build.sh makes it")
	catalog := flag.String("catalog", "critest", "whose images: critest or conformance")
	address := flag.String("listen", "127.0.0.1:5000", "address on loopback")
	flag.Parse()
	if flag.NArg() == 0 || catalogs[*catalog] == nil {
		fmt.Fprintln(os.Stderr, "usage: registry -layers DIR [-catalog critest|conformance] [-listen ADDRESS] COMMAND [ARG...]")
		os.Exit(2)
	}
	err := serve(*address, *layers, catalogs[*catalog], exec.Command(flag.Arg(0), flag.Args()[1:]...))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

// serve runs the command while the registry is up and full.
func serve(address, layers string, catalog []image, command *exec.Cmd) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer listener.Close()
	go http.Serve(listener, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	store := layerStore{dir: layers, layers: map[string]v1.Layer{}}
	for _, i := range catalog {
		image, err := store.image(i)
		if err != nil {
			return fmt.Errorf("image %s: %w", i.names[0], err)
		}
		for _, n := range i.names {
			ref, err := name.NewTag(address+"/"+n, name.Insecure, name.StrictValidation)
			if err != nil {
				return err
			}
			if err := remote.Write(ref, image); err != nil {
				return fmt.Errorf("push %s: %w", n, err)
			}
		}
	}
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	return command.Run()
}

// layerStore reads each layer once; most images share one.
type layerStore struct {
	dir    string
	layers map[string]v1.Layer
}

func (s *layerStore) layer(name string) (v1.Layer, error) {
	if l := s.layers[name]; l != nil {
		return l, nil
	}
	contents, err := os.ReadFile(filepath.Join(s.dir, name+".tar"))
	if err != nil {
		return nil, err
	}
	// Uncompressed, as the archives are: nothing crosses a network.
	s.layers[name] = static.NewLayer(contents, types.DockerUncompressedLayer)
	return s.layers[name], nil
}

func (s *layerStore) image(i image) (v1.Image, error) {
	out := mutate.MediaType(empty.Image, types.DockerManifestSchema2)
	for _, name := range i.layers {
		layer, err := s.layer(name)
		if err != nil {
			return nil, err
		}
		if out, err = mutate.AppendLayers(out, layer); err != nil {
			return nil, err
		}
	}
	config, err := out.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	config.Config.Entrypoint, config.Config.Cmd, config.Config.User = i.entrypoint, i.command, i.user
	// Images under different names have different digests, or containerd would show them as one.
	config.Config.Labels = map[string]string{"name": i.names[0]}
	return mutate.ConfigFile(out, config)
}
