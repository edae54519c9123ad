/* A program with the set-user-ID bit: says whose rights it runs with, in the words that critest looks for. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}
